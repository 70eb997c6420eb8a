"""Hinge: DPO's margin with the loss of a support vector machine.

Paper: Liu et al. 2023, Statistical Rejection Sampling Improves Preference Optimization, arXiv:2309.06657.

    loss = max(0, 1 - b h),    h = log pi/ref(y_w) - log pi/ref(y_l)

Symbols: b = beta; y_w the better response, y_l the worse.
Length: sum.
Bounded below: yes, by 0.
Pins the level: no.
Limits: no gradient once b h > 1.
Departures: as TRL 1.16 `hinge`. This is not SLiC, which has no reference.
Verified: closed form; a vector on which the executed code of TRL 1.16 agrees.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Gt

from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class Hinge(Head):
    needs: ClassVar[Needs] = Needs(layout="pair", reference=True)

    beta: Annotated[float, Gt(0)] = 0.1

    def __call__(self, x: HeadInput) -> HeadOutput:
        chosen_G, rejected_G = x.logratio_GK.unbind(-1)
        margin_G = self.beta * (chosen_G - rejected_G)
        return HeadOutput((1 - margin_G).relu(), {"hinge/inside": (margin_G < 1).to(margin_G.dtype)})

    def start(self, K: int) -> float:
        return 1.0
