"""RLOO without a reference: REINFORCE on whole responses; the other samples of the prompt are the baseline.

Paper: Ahmadian et al. 2024, Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in
    LLMs, arXiv:2402.14740.

    loss = -min(s A, clip(s, 1 - el, 1 + eh) A),    s = pi(y) / mu(y),    A_i = r_i - mean_{j != i} r_j

Symbols: r the reward; el, eh = epsilon_low, epsilon_high; mu the policy that sampled; the log-ratio in s is kept within
    +-20.
Length: sum.
Bounded below: where A > 0, by -(1 + eh) A; where A < 0, by 0.
Pins the level: no.
Limits: this is `rloo` with beta = 0, for which no reference need be held. pi == mu: the gradient is -A grad log pi(y).
    A prompt with a single sample keeps its reward as A.
Departures: as `rloo`: the clip is TRL's, and corrections of the sampler's imprecision enter by their mean.
Unverified: as `rloo`: the paper was not read.
Verified: closed form; a vector on which the executed code of TRL 1.16 agrees; equal to `rloo` with beta = 0.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Gt, Le

from po.numeric import clip_ended, clipped_surrogate, importance_ratio, leave_one_out
from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class RLOORefFree(Head):
    needs: ClassVar[Needs] = Needs(layout="set", unit="response", reward=True, behaviour=True, correction=True)

    epsilon_low: Annotated[float, Gt(0), Le(1)] = 0.2
    epsilon_high: Annotated[float, Gt(0)] = 0.2

    def __call__(self, x: HeadInput) -> HeadOutput:
        advantage_GK = leave_one_out(x.reward_GK, x.seg.valid_GK)
        ratio_GK = importance_ratio(x.seg.sum(x.policy_T - x.old_T), x.policy_T.new_zeros(()))
        loss_GK = clipped_surrogate(ratio_GK, advantage_GK, self.epsilon_low, self.epsilon_high)
        low_GK, high_GK = clip_ended(ratio_GK, advantage_GK, self.epsilon_low, self.epsilon_high)
        metrics = {
            "rloo_ref_free/ratio": ratio_GK.detach(),
            "rloo_ref_free/clip_low": low_GK,
            "rloo_ref_free/clip_high": high_GK,
        }
        return HeadOutput(loss_GK * x.seg.mean(x.correction_T), metrics)
