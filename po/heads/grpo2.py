"""2-GRPO: GRPO on exactly two samples of each prompt, where every disagreement counts +1 against -1.

Paper: Wu et al. 2025, It Takes Two: Your GRPO Is Secretly DPO, arXiv:2510.00977.

    loss = (1/|y|) sum_t -min(r_t A, clip(r_t, 1 - e_low, 1 + e_high) A),    r_t = pi/mu(y_t | x, y_<t)
    A = +1 for the sample with the higher reward, -1 for the other, 0 for both where the rewards are equal

Symbols: mu the policy that sampled; e_low = epsilon_low and e_high = epsilon_high, the clip.
Length: mean.
Bounded below: no; the clip ends the gradient, not the fall.
Pins the level: no.
Limits: at pi = mu the gradient of a disagreeing pair, the mean over its two responses, is
    -(1/2) (mean_t grad log pi(y+_t) - mean_t grad log pi(y-_t)): DPO's direction without its reference and its factor.
    Pairs that agree have no gradient and count in the average; grpo2/agree is their share. In expectation over samples
    the signal is that of R - mean(R), not of its scaled form. grpo2/clip_low and grpo2/clip_high are the shares of
    tokens whose gradient the clip has ended at A < 0 and at A > 0.
Departures: a group that has not two responses has loss 0 and no gradient, whatever its rewards (grpo2/other_size is the
    share of such groups, and should be 0): for more samples take grpo. A follows from the population standard deviation
    without eps, the paper's. TRL and verl have the unbiased one, +-0.7071 for the same pair: that is grpo as it comes.
    Sampling until a pair disagrees (2-GRPO+RS) is a matter of the rollout. The paper's learning rate for two samples is
    8 times that for 16.
Unverified: no code of the authors was found; that equal rewards give A = 0 is the paper's text.
Verified: closed form; vectors of an independent script, also with TRL's advantages by `grpo`; identity with grpo of
    scale population.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Gt, Le

from po.numeric import clip_ended, clipped_surrogate, importance_ratio, masked_center
from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class GRPO2(Head):
    needs: ClassVar[Needs] = Needs(
        layout="set", unit="response", reward=True, behaviour=True, correction=True, group_size=2
    )

    epsilon_low: Annotated[float, Gt(0), Le(1)] = 0.2
    epsilon_high: Annotated[float, Gt(0)] = 0.28

    def __call__(self, x: HeadInput) -> HeadOutput:
        two_G1 = x.seg.valid_GK.sum(-1, keepdim=True) == 2
        A_GK = masked_center(x.reward_GK, x.seg.valid_GK & two_G1).sign()
        A_T = x.seg.spread(A_GK)
        ratio_T = importance_ratio(x.policy_T, x.old_T)
        loss_T = x.correction_T * clipped_surrogate(ratio_T, A_T, self.epsilon_low, self.epsilon_high)
        low_T, high_T = clip_ended(ratio_T, A_T, self.epsilon_low, self.epsilon_high)
        metrics = {
            "grpo2/clip_low": low_T,
            "grpo2/clip_high": high_T,
            "grpo2/agree": ((A_GK == 0).all(-1) & two_G1[:, 0]).to(ratio_T.dtype),
            "grpo2/other_size": (~two_G1[:, 0]).to(ratio_T.dtype),
        }
        return HeadOutput(x.seg.mean(loss_T), metrics)

    def start(self, K: int) -> float | None:
        return None if K == 2 else 0.0
