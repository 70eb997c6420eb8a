"""SPPO with hard labels: pull the better response's log-ratio to +1 / (2 beta) and the worse one's to -1 / (2 beta).

Paper: Wu et al. 2024, Self-Play Preference Optimization for Language Model Alignment, arXiv:2405.00675.

    loss = (u(y_w) - 1 / (2 b))^2 + (u(y_l) + 1 / (2 b))^2,    u(y) = log pi/ref(y)

Symbols: b = beta, so that the targets are +-1 / (2 b) nats (+-500 at 0.001); y_w the better response, taken to win with
    probability 1, y_l the worse. The metrics sppo_hard/chosen_gap and /rejected_gap are the two differences.
Length: sum.
Bounded below: yes, by 0.
Pins the level: yes; each response has a target of its own.
Limits: least at u(y_w) = 1 / (2 b), u(y_l) = -1 / (2 b). Gradients at policy == reference are -+1 / b, so it wants
    clipping. The loss is IPO's square with tau = b / 2, half of it, and half the square of u(y_w) + u(y_l).
Departures: as TRL 1.16 `sppo_hard`. Code that descends from the authors' trainer has half of this. The paper estimates
    the probability of winning from several samples and a preference model; hard labels set it to 1 and 0.
Unverified: the constant factor in the authors' own code; the text of the paper was not at hand.
Verified: closed form; a vector on which the executed code of TRL 1.16 agrees; identity with IPO.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Gt

from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class SPPOHard(Head):
    needs: ClassVar[Needs] = Needs(layout="pair", reference=True)

    beta: Annotated[float, Gt(0)] = 0.001

    def __call__(self, x: HeadInput) -> HeadOutput:
        chosen_G, rejected_G = x.logratio_GK.unbind(-1)
        up_G, down_G = chosen_G - 1 / (2 * self.beta), rejected_G + 1 / (2 * self.beta)
        metrics = {"sppo_hard/chosen_gap": up_G.detach(), "sppo_hard/rejected_gap": down_G.detach()}
        return HeadOutput(up_G**2 + down_G**2, metrics)

    def start(self, K: int) -> float:
        return 1 / (2 * self.beta**2)
