"""GCPO (gold): GSPO on groups in which a gold answer stands where every sample was wrong.

Paper: Wu and Liu 2025, GCPO: When Contrast Fails, Go Gold, arXiv:2510.07790.

    loss = -min(s A, clip(s, 1 - el, 1 + eh) A),    s = exp(u - v),    u = mean_t log pi(y_t)
    v = mean_t log mu(y_t) of a sample,    v = sg(u) of a gold answer

Symbols: el, eh = epsilon_low, epsilon_high; mu the policy that sampled; sg: no gradient; A = (r - mean r) /
    std r over the responses of the prompt; scale: std divides by n (population), by n - 1 (unbiased), or A is
    r - mean r (none). The column gold of each response is 1 for a gold answer and 0 for a sample; what a
    gold answer carries as log mu is not read.
Length: mean over tokens, in the ratio.
Bounded below: where A > 0, by -(1 + eh) A; where A < 0, by 0.
Pins the level: no.
Limits: no gold answers: GSPO. A gold answer's ratio is 1, so it is never clipped, and its gradient is that of its
    mean log-likelihood times A. With one gold answer among n responses A = sqrt(n - 1), so large groups weigh it
    heavily; scale = none bounds it by 1 - 1/n. Gold answers must look like the samples (template, format).
Departures: the head takes groups as they come: whoever makes them puts the gold answer in, in place of a wrong sample
    or beside them, and scores it.
Unverified: the objective; only the abstract was at hand. Whether the gold answer replaces a sample, what its mu is, its
    cap, both epsilons and the use of it beside right samples are not known; this is GSPO with the ratio of 1.
Verified: closed form; a vector of an independent script for this form (no public code was executed).
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Gt, Le

from po.numeric import clipped_surrogate, group_advantages, importance_ratio
from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class GCPOGold(Head):
    needs: ClassVar[Needs] = Needs(
        layout="set",
        unit="response",
        reward=True,
        behaviour=True,
        correction=True,
        response_columns=("gold",),
        stops_gradient=True,
    )

    epsilon_low: Annotated[float, Gt(0), Le(1)] = 0.2
    epsilon_high: Annotated[float, Gt(0)] = 0.2
    scale: Literal["population", "unbiased", "none"] = "population"

    def __call__(self, x: HeadInput) -> HeadOutput:
        advantage_GK = group_advantages(x.reward_GK, x.seg.valid_GK, self.scale)
        gold_GK = x.seg.valid_GK & (x.response_column_GK("gold") > 0)
        mean_GK = x.seg.mean(x.policy_T)
        change_GK = torch.where(gold_GK, mean_GK - mean_GK.detach(), x.seg.mean(x.policy_T - x.old_T))
        ratio_GK = importance_ratio(change_GK, x.policy_T.new_zeros(()))
        loss_GK = clipped_surrogate(ratio_GK, advantage_GK, self.epsilon_low, self.epsilon_high)
        metrics = {
            "gcpo_gold/gold": gold_GK.to(ratio_GK.dtype),
            "gcpo_gold/gold_logp": torch.where(gold_GK, mean_GK.detach(), 0),
            "gcpo_gold/ratio": ratio_GK.detach(),
            "gcpo_gold/zero_std": (advantage_GK == 0).all(-1).to(ratio_GK.dtype),
        }
        return HeadOutput(loss_GK * x.seg.mean(x.correction_T), metrics)
