"""Relative Preference Optimization, paired: each chosen response against all rejected ones, near prompts first.

Paper: Yin et al. 2024, Relative Preference Optimization: Enhancing LLM Alignment through Contrasting Responses across
    Identical and Diverse Prompts, arXiv:2402.10958.

    loss_i = mean_j -log s( b w_ij (u(y_w,i) - u(y_l,j)) ),    w_ij = softmax_j(-d_ij / t),    u(y) = log pi/ref(y)

Symbols: s = sigmoid; b = beta; t = tau, smaller looks at nearer prompts alone; d_ij = 1 - cosine of the embeddings of
    prompts i and j; y_w,i the better response of prompt i, y_l,j the worse one of prompt j, i itself included.
Length: sum.
Bounded below: yes, by 0.
Pins the level: no; a shift of all log-ratios changes nothing.
Limits: one pair in the step is DPO. The weights of a row add up to 1 and stand inside the sigmoid, so the more pairs
    a step has, the weaker it is: on like prompts the scale is b / (pairs of the step).
Departures: the contrast is over the whole optimizer step; the authors' trainer contrasts each device's micro-batch
    alone, and its batch size there is the size of the step here that gives the same loss.
Verified: closed form; a vector on which the authors' executed code agrees; identity with DPO.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Gt
from torch.nn.functional import logsigmoid, normalize

from po.numeric import masked_mean, masked_softmax
from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class RPOContrast(Head):
    needs: ClassVar[Needs] = Needs(layout="pair", reference=True, prompt_embedding=True, couples_batch=True)

    beta: Annotated[float, Gt(0)] = 0.1
    tau: Annotated[float, Gt(0)] = 0.5

    def __call__(self, x: HeadInput) -> HeadOutput:
        some_G = x.seg.valid_GK.any(-1)
        unit_GE = normalize(torch.where(some_G[:, None], x.prompt_embedding_GE, 0), dim=-1)
        weight_GG = masked_softmax(unit_GE @ unit_GE.T, some_G, 1 / self.tau)  # the 1 of the distance cancels
        chosen_G, rejected_G = x.logratio_GK.unbind(-1)
        margin_GG = self.beta * weight_GG * (chosen_G[:, None] - rejected_G[None, :])
        own_G = weight_GG.diagonal().to(chosen_G.dtype)
        return HeadOutput(masked_mean(-logsigmoid(margin_GG), some_G), {"rpo_contrast/own_weight": own_G})

    def start(self, K: int) -> float:
        return math.log(2)
