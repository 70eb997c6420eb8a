"""PADLL: DPO's loss, halved where the policy ranks the pair wrongly; found by a language model.

Paper: Lu et al. 2024, Discovering Preference Optimization Algorithms with and for Large Language Models,
    arXiv:2406.08414.

    loss = 0.9 (1 - [h < 0] / 2) (-log s(b h)),    h = log pi/ref(y_w) - log pi/ref(y_l)

Symbols: s = sigmoid; b = beta; [h < 0] is 1 where h is negative, else 0; y_w the better response, y_l the worse.
Length: sum.
Bounded below: yes, by 0.
Pins the level: no.
Limits: jumps from 0.45 log 2 up to 0.9 log 2 as h passes 0 from below, which no gradient shows. At h = 0 the weight is
    whole.
Departures: the authors' code rounds 0.9 to single precision. TRL and HALOs have no such loss.
Verified: closed form; a vector on which the authors' executed code agrees.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Gt
from torch.nn.functional import logsigmoid

from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class PADLL(Head):
    needs: ClassVar[Needs] = Needs(layout="pair", reference=True)

    beta: Annotated[float, Gt(0)] = 0.05

    def __call__(self, x: HeadInput) -> HeadOutput:
        chosen_G, rejected_G = x.logratio_GK.unbind(-1)
        h_G = chosen_G - rejected_G
        wrong_G = (h_G < 0).to(h_G.dtype)
        loss_G = -0.9 * (1 - wrong_G / 2) * logsigmoid(self.beta * h_G)
        return HeadOutput(loss_G, {"padll/wrong": wrong_G})

    def start(self, K: int) -> float:
        return 0.9 * math.log(2)
