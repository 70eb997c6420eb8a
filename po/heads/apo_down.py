"""APO-down: lower both responses, the worse one more, for pairs whose better response is still worse than the model.

Paper: D'Oosterlinck et al. 2024, Anchored Preference Optimization and Contrastive Revisions: Addressing
    Underspecification in Alignment, arXiv:2408.06266.

    loss = s(b u(y_w)) + [1 - s(b u(y_w) - b u(y_l))],    u(y) = log pi/ref(y)

Symbols: s = sigmoid; b = beta; y_w the better response, y_l the worse. The two terms of the loss are the metrics
    apo_down/chosen and apo_down/margin.
Length: sum.
Bounded below: yes; the loss is in (0, 2), and pairs far from the reference have no gradient.
Pins the level: yes; the better response's own likelihood is pushed down, the worse one's relative to it.
Limits: at policy == reference the better response has no gradient and the worse one +b/4.
Departures: none known; as in TRL 1.16 `apo_down`. HALOs has none. The authors' repository has no loss code.
Verified: closed form; vectors on which the executed code of TRL 1.16 agrees.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Gt

from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class APODown(Head):
    needs: ClassVar[Needs] = Needs(layout="pair", reference=True)

    beta: Annotated[float, Gt(0)] = 0.1

    def __call__(self, x: HeadInput) -> HeadOutput:
        better_G, worse_G = (self.beta * x.logratio_GK).unbind(-1)
        chosen_G, margin_G = better_G.sigmoid(), (worse_G - better_G).sigmoid()
        metrics = {"apo_down/chosen": chosen_G.detach(), "apo_down/margin": margin_G.detach()}
        return HeadOutput(chosen_G + margin_G, metrics)

    def start(self, K: int) -> float:
        return 1.0
