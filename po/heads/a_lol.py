"""Advantage Leftover Lunch RL (A-LoL): likelihood weighted by advantage and by a clipped importance ratio.

Paper: Baheti et al. 2023, Leftover Lunch: Advantage-based Offline Reinforcement Learning for Language Models,
    arXiv:2305.14718.

    loss = -A w log pi(y),    A = max(R - V(x), 0),    w = clip(pi(y) / ref(y), 1 - e, 1 + e), not differentiated

Symbols: R the response's reward; V(x) the row's number `value`, what the reference expects of the prompt (the paper: a
    value head on the frozen reference, trained on held-out rows); e = epsilon, at least 0.5: the ratio is of whole
    responses, and would leave a narrow range within a few steps.
Length: sum.
Bounded below: yes, by 0.
Pins the level: yes; it raises what is better than expected and ignores the rest.
Limits: w = 1 is a_lol_ref_free, which is also the gradient at policy == reference. Takes responses one by one: a row
    may have one alone. a_lol/kept is the share of responses with A > 0, a_lol/weight the mean ratio w.
Departures: responses with A <= 0 count with loss 0 where the authors leave them out of the data and draw the others in
    proportion to A: filter the rows to have their average. Value and reward are the row's own. TRL and HALOs have none.
Verified: closed form; a vector of an independent script from the authors' code, which was read and not run; identity
    with a_lol_ref_free.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Lt

from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class ALoL(Head):
    needs: ClassVar[Needs] = Needs(
        layout="set",
        unit="response",
        single=True,
        reference=True,
        reward=True,
        columns=("value",),
        raw_logps=True,
        stops_gradient=True,
    )

    epsilon: Annotated[float, Ge(0.5), Lt(1)] = 0.9

    def __call__(self, x: HeadInput) -> HeadOutput:
        above_GK = torch.where(x.seg.valid_GK, x.reward_GK - x.column_G("value")[:, None], 0).clamp(min=0)
        ratio_GK = x.logratio_GK.detach().clamp(max=1).exp().clamp(1 - self.epsilon, 1 + self.epsilon)
        metrics = {"a_lol/kept": (above_GK > 0).to(ratio_GK.dtype), "a_lol/weight": ratio_GK}
        return HeadOutput(-above_GK * ratio_GK * x.seg.sum(x.policy_T), metrics)
