"""Group Sequence Policy Optimization (GSPO): GRPO with one importance ratio for the whole response.

Paper: Zheng et al. 2025, Group Sequence Policy Optimization, arXiv:2507.18071.

    loss = -min(s A, clip(s, 1 - e_low, 1 + e_high) A),    s = exp((1/|y|) sum_t log pi/mu(y_t | x, y_<t))
    A = (R - mean(R)) / (std(R) + eps), over the responses of the prompt

Symbols: mu the policy that sampled; s the geometric mean of the tokens' ratios; e_low = epsilon_low and e_high =
    epsilon_high, the clip, which is much narrower than for tokens; scale: the standard deviation divides by n
    (population), by n - 1 (unbiased), or A is R - mean(R) (none); eps beside it.
Length: mean.
Bounded below: no; the clip ends the gradient, not the fall.
Pins the level: no.
Limits: at pi = mu loss and gradient are grpo's. The clip keeps or drops whole responses: gspo/clip_low and
    gspo/clip_high are the shares of responses whose gradient it has ended at A < 0 and at A > 0, large by design.
    Groups whose rewards are equal have loss 0 and count; gspo/zero_std is their share. The mean log-ratio is kept
    within +-20.
Departures: as TRL 1.16 with `importance_sampling_level: sequence` and `loss_type: grpo`, and verl's `gspo`. Where the
    sampler's imprecision is corrected, the loss is multiplied with the mean of the tokens' weights, as TRL does. The
    paper leaves the estimator of std open: unbiased as in TRL (eps 1e-4) and verl (1e-6). Its GSPO-token is left out.
Unverified: the paper's text was not at hand; its clip is as TRL's documentation quotes it (section 5.1).
Verified: closed form of every option; a vector of an independent script on which the executed code of TRL 1.16 and verl
    agrees; identity with grpo at pi = mu and on responses of one token.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Le

from po.numeric import clip_ended, clipped_surrogate, group_advantages, importance_ratio
from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class GSPO(Head):
    needs: ClassVar[Needs] = Needs(layout="set", unit="response", reward=True, behaviour=True, correction=True)

    epsilon_low: Annotated[float, Gt(0), Le(1)] = 3e-4
    epsilon_high: Annotated[float, Gt(0)] = 4e-4
    scale: Literal["population", "unbiased", "none"] = "unbiased"
    eps: Annotated[float, Ge(0)] = 0.0

    def __call__(self, x: HeadInput) -> HeadOutput:
        A_GK = group_advantages(x.reward_GK, x.seg.valid_GK, self.scale, self.eps)
        ratio_GK = importance_ratio(x.seg.mean(x.policy_T - x.old_T), x.policy_T.new_zeros(()))
        loss_GK = clipped_surrogate(ratio_GK, A_GK, self.epsilon_low, self.epsilon_high)
        low_GK, high_GK = clip_ended(ratio_GK, A_GK, self.epsilon_low, self.epsilon_high)
        metrics = {
            "gspo/ratio": ratio_GK.detach(),
            "gspo/clip_low": low_GK,
            "gspo/clip_high": high_GK,
            "gspo/zero_std": (A_GK == 0).all(-1).to(ratio_GK.dtype),
        }
        return HeadOutput(x.seg.mean(x.correction_T) * loss_GK, metrics)
