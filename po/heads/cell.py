"""CELL: half DPO's logistic loss, half an exponential one; found by a language model.

Paper: Lu et al. 2024, Discovering Preference Optimization Algorithms with and for Large Language Models,
    arXiv:2406.08414.

    loss = exp(-m) / 2 - log s(m) / 2,    m = b h,    h = log pi/ref(y_w) - log pi/ref(y_l)

Symbols: s = sigmoid; b = beta; y_w the better response, y_l the worse.
Length: sum.
Bounded below: yes, by 0.
Pins the level: no.
Limits: one badly ranked pair outweighs a batch: the gradient grows like exp(-m), so clip it. From m = -30 down the
    exponential is held constant (1e13) without gradient, and the logistic half is left: at m = -1000 b the loss is
    finite and the gradient -1/2.
Departures: the cap at m = -30; the authors' code overflows in fp32 below m = -88. TRL and HALOs have no such loss.
Verified: closed form; a vector on which the authors' executed code agrees.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Gt
from torch.nn.functional import logsigmoid

from po.numeric import capped_exp
from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class CELL(Head):
    needs: ClassVar[Needs] = Needs(layout="pair", reference=True)

    beta: Annotated[float, Gt(0)] = 0.05

    def __call__(self, x: HeadInput) -> HeadOutput:
        chosen_G, rejected_G = x.logratio_GK.unbind(-1)
        m_G = self.beta * (chosen_G - rejected_G)
        capped_G = (m_G.detach() < -30).to(m_G.dtype)
        return HeadOutput((capped_exp(-m_G) - logsigmoid(m_G)) / 2, {"cell/capped": capped_G})

    def start(self, K: int) -> float:
        return (1 + math.log(2)) / 2
