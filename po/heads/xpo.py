"""Exploratory Preference Optimization: DPO on fresh pairs, plus a term that lowers what the reference itself says.

Paper: Xie et al. 2024, Exploratory Preference Optimization: Harnessing Implicit Q*-Approximation for Sample-Efficient
    RLHF, arXiv:2405.21046.

    loss = -log s(beta h) + alpha log pi(y'),    h = log pi/ref(y_w) - log pi/ref(y_l)

Symbols: s = sigmoid; y_w the better response, y_l the worse; y' the one of them that the reference sampled, which has 1
    in the response's column `from_reference` and the policy's own has 0; alpha: the strength of exploration. The metric
    xpo/own is log pi(y').
Length: sum.
Bounded below: no; log pi(y') may fall for ever, at the slope alpha.
Pins the level: no for the pair; y' is pushed down, chosen or not.
Limits: alpha = 0, or a pair without 1 in the column, is DPO; where both have 1, both are pushed.
Departures: as the trainer that TRL had up to 1.10, whose alpha may also be a list by epoch. In selm the term is alpha
    beta log pi/ref(y'), the same gradient for alpha beta in the place of alpha.
Unverified: the paper prints no alpha; 1e-5 is TRL's. Its text was not at hand.
Verified: closed form; a vector of an independent script. No public code was run: TRL 1.16 has no XPO.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt
from torch.nn.functional import logsigmoid

from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class XPO(Head):
    needs: ClassVar[Needs] = Needs(layout="pair", reference=True, response_columns=("from_reference",), raw_logps=True)

    beta: Annotated[float, Gt(0)] = 0.1
    alpha: Annotated[float, Ge(0)] = 1e-5

    def __call__(self, x: HeadInput) -> HeadOutput:
        better_G, worse_G = x.logratio_GK.unbind(-1)
        theirs_GK = x.response_column_GK("from_reference") > 0.5
        own_G = torch.where(theirs_GK, x.seg.sum(x.policy_T), 0).sum(-1)
        loss_G = -logsigmoid(self.beta * (better_G - worse_G)) + self.alpha * own_G
        return HeadOutput(loss_G, {"xpo/own": own_G.detach()})
