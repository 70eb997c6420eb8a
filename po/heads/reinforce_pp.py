"""REINFORCE++: clipped REINFORCE on tokens; returns less the KL to come, whitened over all tokens of the step.

Paper: Hu et al. 2025, REINFORCE++: An Efficient RLHF Algorithm with Robustness to Both Prompt and Reward Models,
    arXiv:2501.03262.

    loss_t = -min(rho_t A_t, clip(rho_t, 1 - el, 1 + eh) A_t),    rho_t = pi(y_t) / mu(y_t)
    A_t = (R_t - mean R) / std R,    R_t = r - b sum_{s >= t} log mu(y_s)/ref(y_s)

Symbols: r the response's reward, from which baseline = group takes the mean over the prompt's samples (REINFORCE++-
    baseline); b = beta; el, eh = epsilon_low, epsilon_high; mu the policy that sampled; mean and standard deviation are
    over all tokens of the step, and variance says whether the deviation's divisor is n (population) or n - 1
    (unbiased). Returns are not discounted.
Length: the loss is a mean over the tokens of the step; so is the baseline, in which long responses weigh more.
Bounded below: where A_t > 0, by -(1 + eh) A_t; where A_t < 0, by 0.
Pins the level: through the KL.
Limits: the step's groups are taken together, over micro-batches and ranks, so whitening depends on the size of a step.
    Equal returns everywhere give no gradient: a variance below 1e-8 counts as 1e-8. Takes responses one by one: one
    sample of a prompt is enough, but with baseline = group such a one scores 0, whatever its reward.
Departures: whitening over what one optimizer step reads, where OpenRLHF and verl take the whole batch of rollouts: the
    same where a step reads all of them. verl divides by n - 1 (`variance: unbiased`). For the group baseline the paper
    prefers a KL term in the loss; here it stays in the reward.
Unverified: the paper was not read; the formula is that of OpenRLHF and verl, and the default of beta is ours.
Verified: closed form; returns, whitened advantages and loss of an independent script.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le

from po.numeric import clip_ended, clipped_surrogate, importance_ratio, later_sums, masked_center, whiten
from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class ReinforcePP(Head):
    needs: ClassVar[Needs] = Needs(
        layout="set",
        unit="token",
        single=True,
        reference=True,
        reward=True,
        behaviour=True,
        correction=True,
        raw_logps=True,
        couples_batch=True,
    )

    beta: Annotated[float, Ge(0)] = 0.01
    baseline: Literal["none", "group"] = "none"
    variance: Literal["population", "unbiased"] = "population"
    epsilon_low: Annotated[float, Gt(0), Le(1)] = 0.2
    epsilon_high: Annotated[float, Gt(0)] = 0.2

    def __call__(self, x: HeadInput) -> HeadOutput:
        valid_GK = x.seg.valid_GK
        grouped = self.baseline == "group"
        score_GK = masked_center(x.reward_GK, valid_GK) if grouped else torch.where(valid_GK, x.reward_GK, 0)
        kl_T = x.old_T - x.ref_T
        return_T = x.seg.spread(score_GK) - self.beta * later_sums(kl_T, x.seg.slot_T)
        advantage_T = whiten(return_T, x.seg.spread(valid_GK), unbiased=self.variance == "unbiased")
        ratio_T = importance_ratio(x.policy_T, x.old_T)
        loss_T = clipped_surrogate(ratio_T, advantage_T, self.epsilon_low, self.epsilon_high)
        low_T, high_T = clip_ended(ratio_T, advantage_T, self.epsilon_low, self.epsilon_high)
        metrics = {
            "reinforce_pp/return": return_T,
            "reinforce_pp/kl": kl_T,
            "reinforce_pp/ratio": ratio_T.detach(),
            "reinforce_pp/clip_low": low_T,
            "reinforce_pp/clip_high": high_T,
        }
        return HeadOutput(loss_T * x.correction_T, metrics)
