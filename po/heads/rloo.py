"""RLOO: REINFORCE on whole responses; the other samples of the prompt are the baseline, the KL is in the reward.

Paper: Ahmadian et al. 2024, Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in
    LLMs, arXiv:2402.14740.

    loss = -min(s A, clip(s, 1 - el, 1 + eh) A),    s = pi(y) / mu(y)
    A_i = R_i - mean_{j != i} R_j,    R = r - b log mu(y)/ref(y)

Symbols: r the reward; b = beta; el, eh = epsilon_low, epsilon_high; mu the policy that sampled; the log-ratio in s is
    kept within +-20.
Length: sum, in s as well as in the KL.
Bounded below: where A > 0, by -(1 + eh) A; where A < 0, by 0.
Pins the level: through the KL.
Limits: pi == mu: the gradient is -A grad log pi(y), REINFORCE's. A prompt with a single sample keeps its reward as A.
Departures: the clip is TRL's; the paper trains once on each sample, where s = 1 and the clip does nothing. Per-token
    corrections of the sampler's imprecision enter by their mean over the response. TRL 1.16 can also divide A by the
    deviation over the batch (`normalize_advantages`, off by default); here it cannot.
Unverified: the paper was not read; the formula and its defaults are those of TRL 1.16.
Verified: closed form; vectors of an independent script.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge, Gt, Le

from po.numeric import clip_ended, clipped_surrogate, importance_ratio, leave_one_out
from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class RLOO(Head):
    needs: ClassVar[Needs] = Needs(
        layout="set", unit="response", reference=True, reward=True, behaviour=True, correction=True, raw_logps=True
    )

    beta: Annotated[float, Ge(0)] = 0.05
    epsilon_low: Annotated[float, Gt(0), Le(1)] = 0.2
    epsilon_high: Annotated[float, Gt(0)] = 0.2

    def __call__(self, x: HeadInput) -> HeadOutput:
        kl_GK = x.seg.sum(x.old_T - x.ref_T)
        advantage_GK = leave_one_out(x.reward_GK - self.beta * kl_GK, x.seg.valid_GK)
        ratio_GK = importance_ratio(x.seg.sum(x.policy_T - x.old_T), x.policy_T.new_zeros(()))
        loss_GK = clipped_surrogate(ratio_GK, advantage_GK, self.epsilon_low, self.epsilon_high)
        low_GK, high_GK = clip_ended(ratio_GK, advantage_GK, self.epsilon_low, self.epsilon_high)
        metrics = {
            "rloo/kl": kl_GK,
            "rloo/ratio": ratio_GK.detach(),
            "rloo/clip_low": low_GK,
            "rloo/clip_high": high_GK,
        }
        return HeadOutput(loss_GK * x.seg.mean(x.correction_T), metrics)
