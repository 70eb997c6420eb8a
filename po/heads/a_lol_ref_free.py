"""A-LoL without a reference: likelihood weighted by the positive part of the advantage.

Paper: Baheti et al. 2023, Leftover Lunch: Advantage-based Offline Reinforcement Learning for Language Models,
    arXiv:2305.14718.

    loss = -A log pi(y),    A = max(R - V(x), 0)

Symbols: R the response's reward; V(x) the row's number `value`, what the starting policy is expected to get after the
    prompt.
Length: sum.
Bounded below: yes, by 0.
Pins the level: yes; it raises what is better than expected and ignores the rest.
Limits: A = 1 is the sum of the NLL over a response. Takes responses one by one: a row may have one alone.
    a_lol_ref_free/kept is the share of responses with A > 0.
Departures: responses with A <= 0 count with loss 0 where the authors leave them out of the data and draw the others in
    proportion to A: filter the rows to have their average. TRL and HALOs have none.
Verified: closed form; a vector of an independent script from the authors' code, which was read and not run.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class ALoLRefFree(Head):
    needs: ClassVar[Needs] = Needs(layout="set", unit="response", single=True, reward=True, columns=("value",))

    def __call__(self, x: HeadInput) -> HeadOutput:
        above_GK = torch.where(x.seg.valid_GK, x.reward_GK - x.column_G("value")[:, None], 0).clamp(min=0)
        loss_GK = -above_GK * x.seg.sum(x.policy_T)
        return HeadOutput(loss_GK, {"a_lol_ref_free/kept": (above_GK > 0).to(loss_GK.dtype)})
