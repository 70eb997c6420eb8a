"""Length-Unbiased Sequence Policy Optimization (LUSPO): GSPO's loss times the response's length.

Paper: Liu et al. 2026, Length-Unbiased Sequence Policy Optimization: Revealing and Controlling Response Length
    Variation in RLVR, arXiv:2602.05261.

    loss = -|y| min(s A, clip(s, 1 - e_low, 1 + e_high) A),    s = exp((1/|y|) sum_t log pi/mu(y_t | x, y_<t))
    A = (R - mean(R)) / (std(R) + eps), over the responses of the prompt

Symbols: mu the policy that sampled; s the geometric mean of the tokens' ratios; e_low = epsilon_low and e_high =
    epsilon_high, the clip; scale: the standard deviation divides by n (population), by n - 1 (unbiased), or A is
    R - mean(R) (none); eps beside it.
Length: sum.
Bounded below: no; the clip ends the gradient, not the fall.
Pins the level: no.
Limits: at pi = mu the gradient is -A times that of log pi(y), summed over tokens; it grows with the length, so that
    learning rates of grpo and gspo are too large here without gradient clipping. luspo/clip_low and luspo/clip_high
    are the shares of responses whose gradient the clip has ended at A < 0 and at A > 0; luspo/zero_std is the share of
    groups whose rewards are equal, which have loss 0 and count. The mean log-ratio is kept within +-20.
Departures: as TRL 1.16 with `loss_type: luspo` and `importance_sampling_level: sequence`; TRL 1.10, and Liger still,
    average padding in when the level is left at `token`. Where the sampler's imprecision is corrected, |y| is the sum
    of the tokens' weights, as in TRL. The estimator of std is unbiased as in TRL (eps 1e-4) and verl (1e-6).
Unverified: the paper's text was not at hand; its clip is as TRL's documentation quotes it (section 5.1).
Verified: closed form of every option; a vector of an independent script on which the executed code of TRL 1.16 (loss
    and gradient) agrees; identity with gspo.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Le

from po.numeric import clip_ended, clipped_surrogate, group_advantages, importance_ratio
from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class LUSPO(Head):
    needs: ClassVar[Needs] = Needs(layout="set", unit="response", reward=True, behaviour=True, correction=True)

    epsilon_low: Annotated[float, Gt(0), Le(1)] = 2e-3
    epsilon_high: Annotated[float, Gt(0)] = 2.5e-3
    scale: Literal["population", "unbiased", "none"] = "unbiased"
    eps: Annotated[float, Ge(0)] = 0.0

    def __call__(self, x: HeadInput) -> HeadOutput:
        A_GK = group_advantages(x.reward_GK, x.seg.valid_GK, self.scale, self.eps)
        ratio_GK = importance_ratio(x.seg.mean(x.policy_T - x.old_T), x.policy_T.new_zeros(()))
        loss_GK = clipped_surrogate(ratio_GK, A_GK, self.epsilon_low, self.epsilon_high)
        low_GK, high_GK = clip_ended(ratio_GK, A_GK, self.epsilon_low, self.epsilon_high)
        metrics = {
            "luspo/ratio": ratio_GK.detach(),
            "luspo/clip_low": low_GK,
            "luspo/clip_high": high_GK,
            "luspo/zero_std": (A_GK == 0).all(-1).to(ratio_GK.dtype),
        }
        return HeadOutput(x.seg.sum(x.correction_T) * loss_GK, metrics)
