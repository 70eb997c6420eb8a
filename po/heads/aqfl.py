"""AQFL: the distance from a quantile of the batch's margins blends a logistic and a hinge loss.

Paper: Lu et al. 2024, Discovering Preference Optimization Algorithms with and for Large Language Models,
    arXiv:2406.08414.

    loss = g (-log s(m)) + (1 - g) max(0, 1 - m),    g = s(0.1 |z - q|),    q = q0 + 0.05 (s(mean z) - q0),
    q0 = std z * mean s(-z),    z = m / t,    m = b h,    h = log pi/ref(y_w) - log pi/ref(y_l)

Symbols: s = sigmoid; b = beta; t = tau, the scale of the margins in the gate (with tau = beta, z is h); mean and
    (unbiased) std are over all pairs of the optimizer step; y_w the better response, y_l the worse.
Length: sum.
Bounded below: yes, by 0.
Pins the level: no.
Limits: the gate carries a gradient, so every pair moves the quantile of all. Where all margins are equal, as at policy
    == reference, the standard deviation is 0 with gradient 0; so it is in a step of one pair, which is finite.
Departures: statistics over the whole step; the authors' are a micro-batch's, and NaN for a single pair. Their 0.05 is
    tau. TRL and HALOs have no such loss.
Verified: closed form; a vector on which the authors' executed code agrees.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Gt
from torch.nn.functional import logsigmoid

from po.numeric import masked_mean, masked_std
from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class AQFL(Head):
    needs: ClassVar[Needs] = Needs(layout="pair", reference=True, couples_batch=True)

    beta: Annotated[float, Gt(0)] = 0.05
    tau: Annotated[float, Gt(0)] = 0.05

    def __call__(self, x: HeadInput) -> HeadOutput:
        chosen_G, rejected_G = x.logratio_GK.unbind(-1)
        m_G, valid_G = self.beta * (chosen_G - rejected_G), x.seg.valid_GK.all(-1)
        z_G = m_G / self.tau
        base = masked_std(z_G, valid_G) * masked_mean((-z_G).sigmoid(), valid_G)
        q = base + 0.05 * (masked_mean(z_G, valid_G).sigmoid() - base)
        gate_G = 0.1 * (z_G - q).abs()
        loss_G = -gate_G.sigmoid() * logsigmoid(m_G) + (-gate_G).sigmoid() * (1 - m_G).relu()
        return HeadOutput(loss_G, {"aqfl/gate": gate_G.detach().sigmoid()})

    def start(self, K: int) -> float:
        gate = 1 / (1 + math.exp(-0.1 * 0.025))
        return gate * math.log(2) + 1 - gate
