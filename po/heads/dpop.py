"""DPO-Positive (DPOP): DPO with a penalty, inside the sigmoid, where the better response falls below its reference.

Paper: Pal et al. 2024, Smaug: Fixing Failure Modes of Preference Optimisation with DPO-Positive, arXiv:2402.13228.

    loss = -log s(b [u(y_w) - u(y_l) - l max(0, -u(y_w))]),    u(y) = log pi/ref(y)

Symbols: s = sigmoid; b = beta; l = lam, the paper's lambda; y_w the better response, y_l the worse. The metric
    dpop/penalty is max(0, -u(y_w)), in nats.
Length: sum.
Bounded below: yes, by 0.
Pins the level: from below; the better response is pushed back to its reference likelihood with 1 + l times DPO's force.
Limits: l = 0 is DPO, and so is any pair with u(y_w) >= 0. At the kink u(y_w) = 0, that is at policy == reference, the
    penalty has no gradient.
Departures: none known; TRL and HALOs have none, and the authors published no code.
Unverified: the defaults lam 50 and beta 0.3, which are those of several third-party implementations; the text of the
    paper was not at hand.
Verified: closed form; a vector without public counterpart; identity with DPO.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge, Gt
from torch.nn.functional import logsigmoid

from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class DPOP(Head):
    needs: ClassVar[Needs] = Needs(layout="pair", reference=True)

    beta: Annotated[float, Gt(0)] = 0.3
    lam: Annotated[float, Ge(0)] = 50.0

    def __call__(self, x: HeadInput) -> HeadOutput:
        chosen_G, rejected_G = x.logratio_GK.unbind(-1)
        penalty_G = (-chosen_G).relu()
        margin_G = self.beta * (chosen_G - rejected_G - self.lam * penalty_G)
        return HeadOutput(-logsigmoid(margin_G), {"dpop/penalty": penalty_G.detach()})

    def start(self, K: int) -> float:
        return math.log(2)
