"""Relative Preference Optimization without embeddings: mostly one's own rejected response, a little of all others.

Paper: Yin et al. 2024, Relative Preference Optimization: Enhancing LLM Alignment through Contrasting Responses across
    Identical and Diverse Prompts, arXiv:2402.10958.

    loss_i = g l_ii + (1 - g) mean_{j != i} l_ij,    l_ij = -log s( b (u(y_w,i) - u(y_l,j)) ),    u(y) = log pi/ref(y)

Symbols: s = sigmoid; b = beta; g = diagonal_weight; y_w,i the better response of prompt i, y_l,j the worse one of
    prompt j of the step.
Length: sum.
Bounded below: yes, by 0.
Pins the level: no; a shift of all log-ratios changes nothing.
Limits: g = 1, or one pair in the step, is DPO.
Departures: the contrast is over the whole optimizer step; the authors' trainer contrasts each device's micro-batch
    alone.
Verified: closed form; a vector on which the authors' executed code agrees; identity with DPO.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Le
from torch.nn.functional import logsigmoid

from po.numeric import masked_mean
from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class RPODiagonal(Head):
    needs: ClassVar[Needs] = Needs(layout="pair", reference=True, couples_batch=True)

    beta: Annotated[float, Gt(0)] = 0.1
    diagonal_weight: Annotated[float, Ge(0), Le(1)] = 0.8

    def __call__(self, x: HeadInput) -> HeadOutput:
        some_G = x.seg.valid_GK.any(-1)
        chosen_G, rejected_G = x.logratio_GK.unbind(-1)
        loss_GG = -logsigmoid(self.beta * (chosen_G[:, None] - rejected_G[None, :]))
        own_G = loss_GG.diagonal()
        others_GG = some_G & ~torch.eye(len(some_G), dtype=torch.bool, device=some_G.device)
        g_G = torch.where(others_GG.any(-1), self.diagonal_weight, 1.0).to(own_G.dtype)
        others_G = masked_mean(loss_GG, others_GG)
        metrics = {"rpo_diagonal/own": own_G.detach(), "rpo_diagonal/others": others_G.detach()}
        return HeadOutput(g_G * own_G + (1 - g_G) * others_G, metrics)

    def start(self, K: int) -> float:
        return math.log(2)
