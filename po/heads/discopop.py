"""DiscoPOP (LRML): a gate blends DPO's logistic loss with an exponential one; found by a language model.

Paper: Lu et al. 2024, Discovering Preference Optimization Algorithms with and for Large Language Models,
    arXiv:2406.08414.

    loss = s(-m / t) (-log s(m)) + s(m / t) exp(-m),    m = b h,    h = log pi/ref(y_w) - log pi/ref(y_l)

Symbols: s = sigmoid; b = beta; t = tau, the temperature of the gate; y_w the better response, y_l the worse.
Length: sum.
Bounded below: yes, by 0.
Pins the level: no.
Limits: not convex. With tau = 0.05 it has a local minimum at m = -0.119 (0.786) and a local maximum at m = 0.072
    (0.878), and at policy == reference it moves pairs the wrong way: d loss / d m = +0.78. For m -> -inf the loss is
    |m| (tau < 1); s(m / t) exp(-m) is computed as exp(log s(m / t) - m), so that m = -1000 b is no 0 * inf. Only where
    tau is above 1 can this exponent grow; from 30 on it is held constant, without gradient, and the first term is left.
Departures: none known. TRL 1.16 `discopop` and the authors' code compute the naive product: NaN in fp32 below m = -88.
Verified: closed form; a vector on which the executed code of the authors and of TRL 1.16 agrees.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Gt
from torch.nn.functional import logsigmoid

from po.numeric import capped_exp
from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class DiscoPOP(Head):
    needs: ClassVar[Needs] = Needs(layout="pair", reference=True)

    beta: Annotated[float, Gt(0)] = 0.05
    tau: Annotated[float, Gt(0)] = 0.05

    def __call__(self, x: HeadInput) -> HeadOutput:
        chosen_G, rejected_G = x.logratio_GK.unbind(-1)
        m_G = self.beta * (chosen_G - rejected_G)
        gate_G = m_G / self.tau
        loss_G = -(-gate_G).sigmoid() * logsigmoid(m_G) + capped_exp(logsigmoid(gate_G) - m_G)
        return HeadOutput(loss_G, {"discopop/gate": gate_G.detach().sigmoid()})

    def start(self, K: int) -> float:
        return (math.log(2) + 1) / 2
