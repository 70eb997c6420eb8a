"""Relative Preference Optimization, unpaired: each desirable response against every undesirable one of the step.

Paper: Yin et al. 2024, Relative Preference Optimization: Enhancing LLM Alignment through Contrasting Responses across
    Identical and Diverse Prompts, arXiv:2402.10958.

    loss_i = mean_j -log s( b w_ij (u(y_i) - u(y_j)) ),    w_ij = softmax_j(-d_ij / t),    u(y) = log pi/ref(y)

Symbols: s = sigmoid; b = beta; t = tau, smaller looks at nearer prompts alone; d_ij = 1 - cosine of the embeddings of
    the two rows' prompts; i a desirable row, j over the undesirable rows of the step.
Length: sum.
Bounded below: yes, by 0.
Pins the level: no; a shift of all log-ratios changes nothing.
Limits: desirable rows carry the loss, times the step's rows per desirable row, and undesirable ones 0, so that the
    mean over rows is the paper's mean over desirable ones. A step of one kind alone has loss 0. One row of each kind
    is DPO.
Departures: the contrast is over the whole optimizer step; the authors' trainer contrasts each device's micro-batch
    alone.
Verified: closed form; the authors' code was executed on the paired form, to which it reduces on the rows of pairs.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Gt
from torch.nn.functional import logsigmoid, normalize

from po.numeric import masked_mean, masked_softmax
from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class RPOContrastUnpaired(Head):
    needs: ClassVar[Needs] = Needs(
        layout="unpaired", reference=True, label=True, prompt_embedding=True, couples_batch=True
    )

    beta: Annotated[float, Gt(0)] = 0.1
    tau: Annotated[float, Gt(0)] = 0.5

    def __call__(self, x: HeadInput) -> HeadOutput:
        some_G, u_G, label_G = x.seg.valid_GK[:, 0], x.logratio_GK[:, 0], x.label_GK[:, 0]
        chosen_G, rejected_G = some_G & (label_G > 0), some_G & (label_G < 0)
        unit_GE = normalize(torch.where(some_G[:, None], x.prompt_embedding_GE, 0), dim=-1)
        weight_GG = masked_softmax(unit_GE @ unit_GE.T, rejected_G, 1 / self.tau)  # the 1 of the distance cancels
        margin_GG = self.beta * weight_GG * (u_G[:, None] - u_G[None, :])
        rows_per_chosen = some_G.sum() / chosen_G.sum().clamp(min=1)
        loss_G = rows_per_chosen * masked_mean(-logsigmoid(margin_GG), rejected_G)
        metrics = {"rpo_contrast_unpaired/top_weight": weight_GG.amax(-1).to(u_G.dtype)}
        return HeadOutput(torch.where(chosen_G, loss_G, 0), metrics)
