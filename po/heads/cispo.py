"""CISPO: policy gradient whose importance ratio is clipped as a weight, so that no token loses its gradient.

Paper: MiniMax et al. 2025, MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention,
    arXiv:2506.13585.

    loss = -w_t A log pi(y_t | x, y_<t),    averaged over tokens
    w_t = clip(pi/mu(y_t | x, y_<t), 1 - e_low, 1 + e_high), not differentiated
    A = (R - mean(R)) / (std(R) + eps), over the responses of the prompt

Symbols: mu the policy that sampled; e_low = epsilon_low (1: no lower bound) and e_high = epsilon_high, the clip of the
    weight; scale: the standard deviation divides by n (population), by n - 1 (unbiased), or A is R - mean(R) (none);
    eps beside it.
Length: sum, over the tokens of the whole step.
Bounded below: no; the printed loss is a surrogate.
Pins the level: no.
Limits: at pi = mu the gradient is dapo's. Without a clip (e_low = 1, e_high beyond every ratio) it is the importance
    weighted policy gradient. cispo/weight is the mean weight, cispo/clip_low and cispo/clip_high the shares of tokens
    that the clip weighs up and down. Groups whose rewards are equal have loss 0, and their tokens count; cispo/zero_std
    is their share.
Departures: e_low and e_high are the paper's and verl's `clip_ratio_low` and `clip_ratio_high`. The other peers' clamps
    are values of them: TRL's `epsilon_high: c` is an absolute cap without a lower bound, e_low = 1 and e_high = c - 1;
    open-instruct's `clip_higher: h` is e_low = 1 and e_high = h. The paper averages over the tokens of a group, here it
    is the whole step, as in TRL and verl. The estimator of std is unbiased as in TRL (eps 1e-4) and verl (1e-6).
Unverified: the paper's text was not at hand. It prints no e_high as far as notes tell; 4 is the cap of 5 of ScaleRL
    (arXiv:2510.13786), which TRL recommends.
Verified: closed form of every option and peer's clamp; vectors of an independent script on which the executed code of
    TRL 1.16 (loss and gradient) and verl agrees.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Le

from po.numeric import group_advantages, importance_ratio
from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class CISPO(Head):
    needs: ClassVar[Needs] = Needs(
        layout="set",
        unit="token",
        reward=True,
        behaviour=True,
        correction=True,
        stops_gradient=True,
    )

    epsilon_low: Annotated[float, Gt(0), Le(1)] = 1.0
    epsilon_high: Annotated[float, Gt(0)] = 4.0
    scale: Literal["population", "unbiased", "none"] = "unbiased"
    eps: Annotated[float, Ge(0)] = 0.0

    def __call__(self, x: HeadInput) -> HeadOutput:
        A_GK = group_advantages(x.reward_GK, x.seg.valid_GK, self.scale, self.eps)
        ratio_T = importance_ratio(x.policy_T.detach(), x.old_T)
        weight_T = ratio_T.clamp(1 - self.epsilon_low, 1 + self.epsilon_high)
        metrics = {
            "cispo/weight": weight_T,
            "cispo/clip_low": (ratio_T < weight_T).to(ratio_T.dtype),
            "cispo/clip_high": (ratio_T > weight_T).to(ratio_T.dtype),
            "cispo/zero_std": (A_GK == 0).all(-1).to(ratio_T.dtype),
        }
        return HeadOutput(-x.correction_T * weight_T * x.seg.spread(A_GK) * x.policy_T, metrics)
