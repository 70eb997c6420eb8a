"""Negative Preference Optimization: unlearn responses; DPO's loss with nothing on the chosen side.

Paper: Zhang et al. 2024, Negative Preference Optimization: From Catastrophic Collapse to Effective Unlearning,
    arXiv:2404.05868.

    loss = -(2/b) log s(-b u)     for a row to forget,     u = log pi/ref(y)
           0                      for any other

Symbols: s = sigmoid; b = beta; rows to forget are labelled undesirable.
Length: sum.
Bounded below: yes, by 0.
Pins the level: yes; it lowers likelihoods, ever more slowly.
Limits: the gradient is 2 s(b u), 1 at policy == reference; b -> 0 is gradient ascent on the NLL. Desirable rows count
    with loss 0, which dilutes the step: leave them out, or use npo_nll or npo_kl.
Departures: none known; the constant 2/b is kept, so the learning rate of a paper carries over.
Verified: closed form; a vector on which a transcription of the authors' code agrees; identity with DPO.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Gt
from torch.nn.functional import logsigmoid

from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class NPO(Head):
    needs: ClassVar[Needs] = Needs(layout="unpaired", unit="response", reference=True, label=True)

    beta: Annotated[float, Gt(0)] = 0.1

    def __call__(self, x: HeadInput) -> HeadOutput:
        forget_GK = -2 / self.beta * logsigmoid(-self.beta * x.logratio_GK)
        return HeadOutput(torch.where(x.label_GK < 0, forget_GK, 0))
