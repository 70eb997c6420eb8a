"""A-LoL with a KL penalty in place of the importance ratio.

Paper: Baheti et al. 2023, Leftover Lunch: Advantage-based Offline Reinforcement Learning for Language Models,
    arXiv:2305.14718.

    loss = -A log pi(y) + b log pi/ref(y)  where A > 0,  else 0;    A = max(R - V(x), 0)

Symbols: b = beta, in units of the reward; R the response's reward; V(x) the row's number `value`, what the reference
    expects of the prompt.
Length: sum.
Bounded below: no; a response with 0 < A < beta is pushed down without end (its net weight is A - beta).
Pins the level: yes; it raises what is better than expected by more than beta.
Limits: beta -> 0 is a_lol_ref_free. The penalty is log pi/ref on the data's responses, not an estimate of the KL from
    samples of the policy. Takes responses one by one: a row may have one alone. a_lol_kl/kept is the share of
    responses with A > 0.
Departures: responses with A <= 0 have no loss, no penalty either, where the authors leave them out of the data and draw
    the others in proportion to A: filter the rows to have their average. TRL and HALOs have none.
Verified: closed form; a vector of an independent script from the authors' code (ppo_clip 0, kl_beta), which was read
    and not run; identity with a_lol_ref_free.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Gt

from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class ALoLKL(Head):
    needs: ClassVar[Needs] = Needs(
        layout="set",
        unit="response",
        single=True,
        reference=True,
        reward=True,
        columns=("value",),
        raw_logps=True,
    )

    beta: Annotated[float, Gt(0)] = 0.1

    def __call__(self, x: HeadInput) -> HeadOutput:
        above_GK = torch.where(x.seg.valid_GK, x.reward_GK - x.column_G("value")[:, None], 0).clamp(min=0)
        loss_GK = self.beta * x.logratio_GK - above_GK * x.seg.sum(x.policy_T)
        kept_GK = above_GK > 0
        return HeadOutput(torch.where(kept_GK, loss_GK, 0), {"a_lol_kl/kept": kept_GK.to(loss_GK.dtype)})
