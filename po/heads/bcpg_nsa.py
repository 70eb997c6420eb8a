"""BCPG-NSA: offline policy gradient that does not punish the right steps of wrong answers.

Paper: Yang et al. 2025, Unearthing Gems from Stones: Policy Optimization with Negative Sample Augmentation for LLM
    Reasoning, arXiv:2505.14403.

    loss = mean_t -sg(g_t) log pi(y_t),    g = r - mean r - tau mean_t log pi/ref(y_t)
    g_t = max(g, 0) + lam min(g, 0) + delta at right steps of wrong answers,    g_t = g elsewhere

Symbols: tau the weight of the KL; r the reward, and mean r that of the group; a wrong answer has r < mean r; the column
    correct_step holds 1 at each token of a step that was judged right, else 0; lam how much of its penalty such a token
    keeps; delta what it gains; sg: no gradient.
Length: mean over tokens, in the KL too.
Bounded below: no.
Pins the level: through the KL.
Limits: lam = 1 and delta = 0: steps make no difference. No right steps in wrong answers: a KL-regularised policy
    gradient on g. A group of equal rewards trains the KL alone. Groups of a single response have r = mean r.
Departures: segmenting answers into steps and judging them is done before, in the data.
Unverified: the objective; only the abstract and a third party's review were at hand. The baseline, the mean over tokens
    in the KL, the rule for right steps and the defaults are a stand-in.
Verified: closed form; a vector of an independent script for this form (no public code was executed).
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Le

from po.numeric import masked_center
from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class BCPGNSA(Head):
    needs: ClassVar[Needs] = Needs(
        layout="set",
        unit="response",
        reference=True,
        reward=True,
        token_columns=("correct_step",),
        raw_logps=True,
        stops_gradient=True,
    )

    tau: Annotated[float, Gt(0)] = 0.1
    lam: Annotated[float, Ge(-1), Le(1)] = 0.0
    delta: Annotated[float, Ge(0)] = 0.0

    @property
    def beta(self) -> float:
        """The scale of the implicit reward."""
        return self.tau

    def __call__(self, x: HeadInput) -> HeadOutput:
        above_GK = masked_center(x.reward_GK, x.seg.valid_GK)
        g_GK = above_GK - self.tau * x.seg.mean(x.logratio_T.detach())
        g_T = x.seg.spread(g_GK)
        saved_T = x.seg.spread(above_GK < 0) & (x.token_column_T("correct_step") > 0)
        weight_T = torch.where(saved_T, g_T.clamp(min=0) + self.lam * g_T.clamp(max=0) + self.delta, g_T)
        metrics = {"bcpg_nsa/saved": saved_T.to(g_T.dtype), "bcpg_nsa/weight": g_GK}
        return HeadOutput(x.seg.mean(-weight_T * x.policy_T), metrics)
