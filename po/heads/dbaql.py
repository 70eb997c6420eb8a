"""DBAQL: the spread of the batch's margins blends a logistic and an exponential loss; found by a language model.

Paper: Lu et al. 2024, Discovering Preference Optimization Algorithms with and for Large Language Models,
    arXiv:2406.08414.

    loss = c (-log s(m / 0.9)) + (1 - c) exp(-0.9 m),    c = s(var z),    z = m / t,    m = b h,
    h = log pi/ref(y_w) - log pi/ref(y_l)

Symbols: s = sigmoid; b = beta; t = tau, the scale of the margins in c (with tau = beta, z is h); var is the unbiased
    variance over all pairs of the optimizer step; y_w the better response, y_l the worse.
Length: sum.
Bounded below: yes, by 0.
Pins the level: no.
Limits: c carries a gradient, so every pair moves the weights of all. c is 1/2 where all margins are equal and nearly 1
    once they spread. A step of one pair has variance 0, hence c = 1/2, and is finite. (1 - c) exp(-0.9 m) is computed
    in the exponent; from an exponent of 30 on it is held constant, without gradient, and the logistic term is left.
Departures: statistics over the whole step; the authors' are a micro-batch's, and NaN for a single pair. Their 0.05 is
    tau. TRL and HALOs have no such loss.
Verified: closed form; a vector on which the authors' executed code agrees.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Gt
from torch.nn.functional import logsigmoid

from po.numeric import capped_exp, masked_var
from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class DBAQL(Head):
    needs: ClassVar[Needs] = Needs(layout="pair", reference=True, couples_batch=True)

    beta: Annotated[float, Gt(0)] = 0.05
    tau: Annotated[float, Gt(0)] = 0.05

    def __call__(self, x: HeadInput) -> HeadOutput:
        chosen_G, rejected_G = x.logratio_GK.unbind(-1)
        m_G = self.beta * (chosen_G - rejected_G)
        var = masked_var(m_G / self.tau, x.seg.valid_GK.all(-1))
        loss_G = -var.sigmoid() * logsigmoid(m_G / 0.9) + capped_exp(logsigmoid(-var) - 0.9 * m_G)
        return HeadOutput(loss_G, {"dbaql/mix": var.detach().sigmoid().expand_as(m_G)})

    def start(self, K: int) -> float:
        return (math.log(2) + 1) / 2
