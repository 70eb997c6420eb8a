"""APO-zero without pairs: raise desirable responses and lower undesirable ones, each against its own reference.

Paper: D'Oosterlinck et al. 2024, Anchored Preference Optimization and Contrastive Revisions: Addressing
    Underspecification in Alignment, arXiv:2408.06266; the form without pairs is TRL's.

    loss = lambda_d (1 - s(b u))     for a desirable response,     u = log pi/ref(y)
           lambda_u s(b u)           for an undesirable one

Symbols: s = sigmoid; b = beta; lambda_d, lambda_u weigh the two kinds of rows.
Length: sum.
Bounded below: yes, by 0.
Pins the level: yes; rows far from the reference have no gradient.
Limits: KTO with z0 = 0; over a desirable and an undesirable response with weight 1 each it adds up to apo_zero. At
    policy == reference the loss is lambda / 2, the gradient -+ lambda b/4.
Departures: none known; as TRL 1.16 KTO with loss_type `apo_zero_unpaired`, whose desirable_weight and
    undesirable_weight are lambda_d and lambda_u. The paper has pairs only.
Verified: closed form; a vector on which the executed code of TRL 1.16 agrees; identities with kto and apo_zero.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Gt

from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class APOZeroUnpaired(Head):
    needs: ClassVar[Needs] = Needs(layout="unpaired", unit="response", reference=True, label=True)

    beta: Annotated[float, Gt(0)] = 0.1
    lambda_d: Annotated[float, Gt(0)] = 1.0
    lambda_u: Annotated[float, Gt(0)] = 1.0

    def __call__(self, x: HeadInput) -> HeadOutput:
        r_GK = self.beta * x.logratio_GK
        desirable_GK = self.lambda_d * (-r_GK).sigmoid()
        undesirable_GK = self.lambda_u * r_GK.sigmoid()
        return HeadOutput(torch.where(x.label_GK > 0, desirable_GK, undesirable_GK))

    def start(self, K: int) -> float | None:
        return self.lambda_d / 2 if self.lambda_d == self.lambda_u else None
