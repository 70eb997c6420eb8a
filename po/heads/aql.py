"""AQL: a gate at a moving quantile of the batch's margins blends a logistic and a hinge loss.

Paper: Lu et al. 2024, Discovering Preference Optimization Algorithms with and for Large Language Models,
    arXiv:2406.08414.

    loss = g (-log s(m)) + (1 - g) max(0, 1 - m),    g = s(q - z),    q = 0.5 + 0.01 (s(mean z) - 0.5),
    z = m / t,    m = b h,    h = log pi/ref(y_w) - log pi/ref(y_l)

Symbols: s = sigmoid; b = beta; t = tau, the scale of the margins in the gate (with tau = beta, z is h); the mean is
    over all pairs of the optimizer step; y_w the better response, y_l the worse.
Length: sum.
Bounded below: yes, by 0.
Pins the level: no.
Limits: not convex, and at policy == reference the gate's gradient moves pairs the wrong way. q stays within 0.495 and
    0.505, so pairs barely see one another; a step of one pair is its own mean, and finite.
Departures: statistics over the whole step; the authors' are a micro-batch's. Their 0.05 is tau. TRL and HALOs have no
    such loss.
Verified: closed form; a vector on which the authors' executed code agrees.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Gt
from torch.nn.functional import logsigmoid

from po.numeric import masked_mean
from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class AQL(Head):
    needs: ClassVar[Needs] = Needs(layout="pair", reference=True, couples_batch=True)

    beta: Annotated[float, Gt(0)] = 0.05
    tau: Annotated[float, Gt(0)] = 0.05

    def __call__(self, x: HeadInput) -> HeadOutput:
        chosen_G, rejected_G = x.logratio_GK.unbind(-1)
        m_G = self.beta * (chosen_G - rejected_G)
        z_G = m_G / self.tau
        q = 0.5 + 0.01 * (masked_mean(z_G, x.seg.valid_GK.all(-1)).sigmoid() - 0.5)
        loss_G = -(q - z_G).sigmoid() * logsigmoid(m_G) + (z_G - q).sigmoid() * (1 - m_G).relu()
        return HeadOutput(loss_G, {"aql/gate": (q - z_G).detach().sigmoid()})

    def start(self, K: int) -> float:
        gate = 1 / (1 + math.exp(-0.5))
        return gate * math.log(2) + 1 - gate
