"""SELM: DPO, plus a term that moves probability away from what the model has already said.

Paper: Zhang et al. 2024, Self-Exploring Language Models: Active Preference Elicitation for Online Alignment,
    arXiv:2405.19332.

    loss = -log s(b h) + a b u(y'),    h = u(y_w) - u(y_l),    u(y) = log pi/ref(y)

Symbols: s = sigmoid; b = beta; a = alpha, the weight of optimism; y_w the response labelled desirable, y_l the one
    labelled undesirable, y' an unlabelled response of the previous model (of several of a kind, the mean of u).
Length: sum.
Bounded below: no; u(y') may fall for ever, at the slope a b.
Pins the level: no for the pair; y' is pushed down.
Limits: alpha = 0, or no unlabelled response, is DPO. A prompt without a pair has the second term alone; selm/unpaired
    is the share of such prompts.
Departures: none known; as the authors' trainer. Its rounds of sampling, ranking and training are the user's.
Verified: closed form; a vector on which the authors' executed code agrees; identity with DPO.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt
from torch.nn.functional import logsigmoid

from po.numeric import masked_mean
from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class SELM(Head):
    needs: ClassVar[Needs] = Needs(layout="labelled", reference=True, label=True)

    beta: Annotated[float, Gt(0)] = 0.01
    alpha: Annotated[float, Ge(0)] = 0.001

    def __call__(self, x: HeadInput) -> HeadOutput:
        u_GK, label_GK = x.logratio_GK, x.label_GK
        better_GK, worse_GK, own_GK = (x.seg.valid_GK & (label_GK == side) for side in (1, -1, 0))
        margin_G = self.beta * (masked_mean(u_GK, better_GK) - masked_mean(u_GK, worse_GK))
        pair_G = better_GK.any(-1) & worse_GK.any(-1)
        own_G = masked_mean(u_GK, own_GK)
        loss_G = torch.where(pair_G, -logsigmoid(margin_G), 0) + self.alpha * self.beta * own_G
        return HeadOutput(loss_G, {"selm/own": own_G.detach(), "selm/unpaired": (~pair_G).to(u_GK.dtype)})

    def start(self, K: int) -> float:
        return math.log(2) if K > 1 else 0.0
