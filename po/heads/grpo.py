"""Group Relative Policy Optimization (GRPO) without a KL term: clipped policy gradient, the group as the baseline.

Paper: Shao et al. 2024, DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models,
    arXiv:2402.03300.

    loss = (1/|y|) sum_t -min(r_t A, clip(r_t, 1 - e_low, 1 + e_high) A),    r_t = min(pi/mu(y_t | x, y_<t), delta)
    A = (R - mean(R)) / (std(R) + eps), over the responses of the prompt

Symbols: mu the policy that sampled; e_low = epsilon_low and e_high = epsilon_high, the clip; delta the largest ratio
    that counts, which matters where A < 0 (1e9, above every ratio: no such bound); scale: the standard deviation
    divides by n (population), by n - 1 (unbiased), or A is R - mean(R) (none); eps beside it.
Length: mean.
Bounded below: no; the clip ends the gradient, not the fall.
Pins the level: no.
Limits: at pi = mu the loss is -A and its gradient that of REINFORCE with the group's mean as the baseline. Groups whose
    rewards are equal, and of one response, have loss 0, and count in the average; grpo/zero_std is their share.
    grpo/clip_low and grpo/clip_high are the shares of tokens whose gradient the clip has ended at A < 0 and at A > 0.
Departures: the paper's KL term is grpo_kl. Each response counts equally over the whole step, as TRL's `grpo` and verl's
    `seq-mean-token-mean`. The paper leaves the estimator of std open: unbiased is what TRL, verl and OpenRLHF have; eps
    is 1e-4 in TRL, 1e-6 in verl and 1e-9 in OpenRLHF, none in the paper. verl gives the only response of a group A = R.
    TRL's `scale_rewards: batch` has no counterpart. delta is TRL's `delta` (4 in INTELLECT-2) and, from 1 + e_high up,
    the same as dual clip, verl's `clip_ratio_c`, which is 3 there unless one changes it.
Unverified: the clip 0.2 is PPO's; the paper prints none.
Verified: closed form of every option; vectors of an independent script on which the executed code of TRL 1.16 (loss and
    gradient) and verl (dual clip) agrees.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Le

from po.numeric import clip_ended, clipped_surrogate, group_advantages, importance_ratio
from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class GRPO(Head):
    needs: ClassVar[Needs] = Needs(layout="set", unit="response", reward=True, behaviour=True, correction=True)

    epsilon_low: Annotated[float, Gt(0), Le(1)] = 0.2
    epsilon_high: Annotated[float, Gt(0)] = 0.2
    delta: Annotated[float, Gt(1)] = 1e9
    scale: Literal["population", "unbiased", "none"] = "unbiased"
    eps: Annotated[float, Ge(0)] = 0.0

    def __call__(self, x: HeadInput) -> HeadOutput:
        A_GK = group_advantages(x.reward_GK, x.seg.valid_GK, self.scale, self.eps)
        A_T = x.seg.spread(A_GK)
        ratio_T = importance_ratio(x.policy_T, x.old_T).clamp(max=self.delta)
        loss_T = x.correction_T * clipped_surrogate(ratio_T, A_T, self.epsilon_low, self.epsilon_high)
        low_T, high_T = clip_ended(ratio_T, A_T, self.epsilon_low, self.epsilon_high)
        metrics = {
            "grpo/ratio": ratio_T.detach(),
            "grpo/clip_low": low_T,
            "grpo/clip_high": high_T,
            "grpo/zero_std": (A_GK == 0).all(-1).to(ratio_T.dtype),
        }
        return HeadOutput(x.seg.mean(loss_T), metrics)
