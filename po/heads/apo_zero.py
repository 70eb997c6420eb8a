"""APO-zero: raise the better response and lower the worse one, for pairs whose better response beats the model.

Paper: D'Oosterlinck et al. 2024, Anchored Preference Optimization and Contrastive Revisions: Addressing
    Underspecification in Alignment, arXiv:2408.06266.

    loss = [1 - s(b u(y_w))] + s(b u(y_l)),    u(y) = log pi/ref(y)

Symbols: s = sigmoid; b = beta; y_w the better response, y_l the worse. The two terms of the loss are the metrics
    apo_zero/chosen and apo_zero/rejected.
Length: sum.
Bounded below: yes; the loss is in (0, 2), and pairs far from the reference have no gradient.
Pins the level: yes; each response is moved relative to its own reference likelihood, not to the other response.
Limits: at policy == reference the gradients are -b/4 and +b/4.
Departures: none known; as in TRL 1.16 `apo_zero`. HALOs has none for pairs. The authors' repository has no
    loss code.
Verified: closed form; vectors on which the executed code of TRL 1.16 agrees.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Gt

from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class APOZero(Head):
    needs: ClassVar[Needs] = Needs(layout="pair", reference=True)

    beta: Annotated[float, Gt(0)] = 0.1

    def __call__(self, x: HeadInput) -> HeadOutput:
        better_G, worse_G = (self.beta * x.logratio_GK).unbind(-1)
        chosen_G, rejected_G = (-better_G).sigmoid(), worse_G.sigmoid()
        metrics = {"apo_zero/chosen": chosen_G.detach(), "apo_zero/rejected": rejected_G.detach()}
        return HeadOutput(chosen_G + rejected_G, metrics)

    def start(self, K: int) -> float:
        return 1.0
