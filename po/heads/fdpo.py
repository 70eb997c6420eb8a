"""f-DPO: DPO with another divergence than reverse KL between policy and reference.

Paper: Wang et al. 2023, Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse Divergence
    Constraints, arXiv:2309.16240.

    loss = -log s(b [g(y_w) - g(y_l)]),    u = pi/ref(y),    g(y) = f'(u) less a constant:
        reverse_kl: log u        js: log(u / (1 + u))        forward_kl: -1/u        alpha: -u^-a / a

Symbols: s = sigmoid; b = beta; divergence: which f; a = alpha, read with divergence alpha alone, in the paper's
    direction (a -> 0 reverse KL, a -> 1 forward KL); y_w the better response, y_l the worse. The metric fdpo/margin is
    what s is taken of; fdpo/capped tells which responses are beyond the cap (Departures).
Length: sum.
Bounded below: yes, by 0.
Pins the level: no; yet unlike DPO's, the gradients of the two responses differ in size by their own u.
Limits: reverse_kl is DPO; alpha -> 0 is DPO; alpha -> 1 is forward_kl.
Departures: the exponent of u^-a (and of 1/u) ends at 30, where a response's gradient ends too; the authors' code has no
    cap, TRL 1.16 caps alpha at 80 and forward_kl not at all. TRL's coefficient is the other direction, its alpha = 1 -
    alpha here; its reward metrics are b log u. HALOs has none.
Verified: closed form; vectors on which the authors' executed code and TRL 1.16 agree; identities with DPO.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Gt, Lt
from torch import Tensor
from torch.nn.functional import logsigmoid

from po.types import Head, HeadInput, HeadOutput, Needs

_CAP = 30.0  # e^30: even the square of the gradient, as its norm needs it, stays far inside fp32


@dataclass(frozen=True)
class FDPO(Head):
    needs: ClassVar[Needs] = Needs(layout="pair", reference=True)

    beta: Annotated[float, Gt(0)] = 0.1
    divergence: Literal["forward_kl", "js", "alpha", "reverse_kl"] = "js"
    alpha: Annotated[float, Gt(0), Lt(1)] = 0.5

    @property
    def power(self) -> float:
        """The negative power of u in g; 0 where g has none."""
        return {"forward_kl": 1.0, "alpha": self.alpha}.get(self.divergence, 0.0)

    def g(self, u_GK: Tensor) -> Tensor:
        """f'(u) up to a constant, of log u."""
        if self.divergence == "js":
            return logsigmoid(u_GK)
        return -(-self.power * u_GK).clamp(max=_CAP).expm1() / self.power if self.power else u_GK

    def __call__(self, x: HeadInput) -> HeadOutput:
        u_GK = x.logratio_GK
        chosen_G, rejected_G = self.g(u_GK).unbind(-1)
        margin_G = self.beta * (chosen_G - rejected_G)
        capped_GK = (-self.power * u_GK.detach() > _CAP).to(u_GK.dtype)
        return HeadOutput(-logsigmoid(margin_G), {"fdpo/margin": margin_G.detach(), "fdpo/capped": capped_GK})

    def start(self, K: int) -> float:
        return math.log(2)
