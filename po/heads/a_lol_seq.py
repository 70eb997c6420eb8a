"""A-LoL with an importance ratio for each token instead of one for the response.

Paper: Baheti et al. 2023, Leftover Lunch: Advantage-based Offline Reinforcement Learning for Language Models,
    arXiv:2305.14718.

    loss = -A sum_t w_t log pi(y_t | x, y_<t),    w_t = clip(pi/ref(y_t | x, y_<t), 1 - e, 1 + e), not differentiated
    A = max(R - V(x), 0)

Symbols: e = epsilon; R the response's reward; V(x) the row's number `value`, what the reference expects of the prompt.
Length: sum.
Bounded below: yes, by 0.
Pins the level: yes; it raises what is better than expected and ignores the rest.
Limits: w = 1 is a_lol_ref_free, which is also the gradient at policy == reference; with one-token responses it is
    a_lol. The name is the authors': "seq" stands for the per-token ratio. Takes responses one by one: a row may have
    one alone. a_lol_seq/kept is the share of responses with A > 0, a_lol_seq/weight the mean ratio of a token.
Departures: responses with A <= 0 count with loss 0 where the authors leave them out of the data and draw the others in
    proportion to A: filter the rows to have their average. TRL and HALOs have none.
Verified: closed form; a vector of an independent script from the authors' code, which was read and not run; identities
    with a_lol and a_lol_ref_free.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Gt, Lt

from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class ALoLSeq(Head):
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

    epsilon: Annotated[float, Gt(0), Lt(1)] = 0.9

    def __call__(self, x: HeadInput) -> HeadOutput:
        above_GK = torch.where(x.seg.valid_GK, x.reward_GK - x.column_G("value")[:, None], 0).clamp(min=0)
        ratio_T = x.logratio_T.detach().clamp(max=1).exp().clamp(1 - self.epsilon, 1 + self.epsilon)
        metrics = {"a_lol_seq/kept": (above_GK > 0).to(ratio_T.dtype), "a_lol_seq/weight": ratio_T}
        return HeadOutput(-above_GK * x.seg.sum(ratio_T * x.policy_T), metrics)
