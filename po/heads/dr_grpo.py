"""Dr. GRPO: GRPO without its two biases, that is without 1/|y| and without the standard deviation.

Paper: Liu et al. 2025, Understanding R1-Zero-Like Training: A Critical Perspective, arXiv:2503.20783.

    loss = (1/L) sum_t -min(r_t A, clip(r_t, 1 - e_low, 1 + e_high) A)
    r_t = min(pi/mu(y_t | x, y_<t), delta),    A = R - mean(R), over the responses of the prompt

Symbols: mu the policy that sampled; L = max_completion_length, a constant, to be set to the rollout's; e_low =
    epsilon_low and e_high = epsilon_high, the clip; delta the largest ratio that counts, which matters where A < 0
    (1e9, above every ratio: no such bound).
Length: sum; the constant L only scales.
Bounded below: no; the clip ends the gradient, not the fall.
Pins the level: no.
Limits: at pi = mu the gradient is that of REINFORCE with the group's mean as the baseline, without bias but for the
    factor (n - 1) / n. Groups whose rewards are equal have loss 0 and count; dr_grpo/zero_std is their share.
    dr_grpo/clip_low and dr_grpo/clip_high are the shares of tokens whose gradient the clip has ended at A < 0 and at
    A > 0.
Departures: the paper's formula has no L; the authors' code divides by the largest length that may be generated, as
    TRL's `dr_grpo` does and verl's `seq-mean-token-sum-norm` with `norm_adv_by_std_in_grpo: false`. TRL scales A unless
    `scale_rewards: none` is set beside its loss. delta: see grpo.
Unverified: the paper's text was not at hand; the clip 0.2 is PPO's.
Verified: closed form of every option; vectors of an independent script on which the executed code of TRL 1.16 (loss and
    gradient) agrees.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge, Gt, Le

from po.numeric import clip_ended, clipped_surrogate, group_advantages, importance_ratio
from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class DrGRPO(Head):
    needs: ClassVar[Needs] = Needs(layout="set", unit="response", reward=True, behaviour=True, correction=True)

    max_completion_length: Annotated[int, Ge(1)] = 256
    epsilon_low: Annotated[float, Gt(0), Le(1)] = 0.2
    epsilon_high: Annotated[float, Gt(0)] = 0.2
    delta: Annotated[float, Gt(1)] = 1e9

    def __call__(self, x: HeadInput) -> HeadOutput:
        A_GK = group_advantages(x.reward_GK, x.seg.valid_GK, "none")
        A_T = x.seg.spread(A_GK)
        ratio_T = importance_ratio(x.policy_T, x.old_T).clamp(max=self.delta)
        loss_T = x.correction_T * clipped_surrogate(ratio_T, A_T, self.epsilon_low, self.epsilon_high)
        low_T, high_T = clip_ended(ratio_T, A_T, self.epsilon_low, self.epsilon_high)
        metrics = {
            "dr_grpo/ratio": ratio_T.detach(),
            "dr_grpo/clip_low": low_T,
            "dr_grpo/clip_high": high_T,
            "dr_grpo/zero_std": (A_GK == 0).all(-1).to(ratio_T.dtype),
        }
        return HeadOutput(x.seg.sum(loss_T) / self.max_completion_length, metrics)
