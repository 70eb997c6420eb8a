"""PFL: a mild logistic loss where the policy ranks the pair rightly, a steep hinge where it does not.

Paper: Lu et al. 2024, Discovering Preference Optimization Algorithms with and for Large Language Models,
    arXiv:2406.08414.

    loss = -log s(m) / 2       where log pi(y_w) > log pi(y_l)
           2 max(0, 1 - m)     elsewhere,                 m = b h,    h = log pi/ref(y_w) - log pi/ref(y_l)

Symbols: s = sigmoid; b = beta; y_w the better response, y_l the worse. Right or wrong is the policy's own ranking, by
    summed log-probs and without the reference; m is measured against the reference as in DPO.
Length: sum.
Bounded below: yes, by 0.
Pins the level: no.
Limits: jumps where the two log-probs cross, which no gradient shows; long better responses start as wrong.
Departures: none known. TRL and HALOs have no such loss.
Verified: closed form; a vector on which the authors' executed code agrees.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Gt
from torch.nn.functional import logsigmoid

from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class PFL(Head):
    needs: ClassVar[Needs] = Needs(layout="pair", reference=True, raw_logps=True)

    beta: Annotated[float, Gt(0)] = 0.05

    def __call__(self, x: HeadInput) -> HeadOutput:
        chosen_G, rejected_G = x.logratio_GK.unbind(-1)
        m_G = self.beta * (chosen_G - rejected_G)
        logp_GK = x.seg.sum(x.policy_T)
        right_G = logp_GK[:, 0] > logp_GK[:, 1]
        loss_G = torch.where(right_G, -logsigmoid(m_G) / 2, 2 * (1 - m_G).relu())
        return HeadOutput(loss_G, {"pfl/right": right_G.to(m_G.dtype)})
