"""MaPO: TDPO1 whose tokens are weighted by how strongly the reference's activations respond to them.

Paper: Christopoulou et al. 2024, SparsePO: Controlling Preference Alignment of LLMs via Sparse Token Masks,
    arXiv:2410.05102; MaPO is its parameter-free mask.

    loss = -log s(b [u(y_w) - u(y_l) - (d(y_l) - d(y_w))])
    u(y) = sum_t m_t log pi/ref(y_t),    d(y) = sum_t m_t KL_t,    KL_t = KL(ref || pi) over the vocabulary
    m_t = mean over l of (a_l,t - min_t a_l,t) / (max_t a_l,t - min_t a_l,t),    a_l,t = mean over features of H_l,t

Symbols: s = sigmoid; b = beta; H_l,t the reference's hidden state after layer l (l = 0: the embedding) where it
    predicts token t; minimum and maximum run over the response.
Length: sum, of log-ratios and of KL_t.
Bounded below: yes, by 0.
Pins the level: no; only differences of masked sums count.
Limits: m = 1 is TDPO1. The mask lies in [0, 1] and is a constant in the gradient; in every layer one token of a
    response has 0 and one has 1.
Departures: the mask comes from the residual stream alone. The authors' hooks also take the MLP's activation, queries,
    keys (before and after rotation), values and output of attention, further points of the residual stream and the
    logits, and average within each kind first. They standardise before they rescale, which cancels. Where all tokens of
    a response have the same activation, a single token above all, they divide by 0; here that layer's weight is 1. TRL
    and HALOs have no MaPO.
Unverified: nothing that was executed stands behind the mask; its steps are those of the authors' code, as read.
Verified: closed form, mask included; identities with TDPO1 and DPO.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Gt
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from po.types import Head, HeadInput, HeadOutput, Needs, Segments


class Activations(nn.Module):
    """Hidden states (T, L, D) -> the mean over features, a gate per layer. No parameters."""

    def forward(self, hidden_TLD: Tensor) -> dict[str, Tensor]:
        mean_TL = hidden_TLD.mean(-1, dtype=torch.promote_types(hidden_TLD.dtype, torch.float32))
        return {f"layer_{i}": mean_T for i, mean_T in enumerate(mean_TL.unbind(1))}


def _rescaled(a_T: Tensor, seg: Segments) -> Tensor:
    """From 0 at a response's least activation to 1 at its greatest; 1 where they are equal."""
    empty = a_T.new_zeros(seg.valid_GK.numel())
    low, high = (empty.scatter_reduce(0, seg.slot_T, a_T, how, include_self=False) for how in ("amin", "amax"))
    low_T, span_T = low[seg.slot_T], (high - low)[seg.slot_T]
    return torch.where(span_T > 0, (a_T - low_T) / torch.where(span_T > 0, span_T, 1), 1)


@dataclass(frozen=True)
class MaPO(Head):
    needs: ClassVar[Needs] = Needs(layout="pair", reference=True, token_kl=True, hidden="ref")

    beta: Annotated[float, Gt(0)] = 0.1

    def build(self, hidden_size: int, layers: int) -> nn.Module:
        return Activations()

    def __call__(self, x: HeadInput) -> HeadOutput:
        layers = [x.gate_T(f"layer_{i}").detach() for i in range(max(len(x.gates), 1))]
        mask_T = torch.stack([_rescaled(a_T, x.seg) for a_T in layers]).mean(0)
        u_GK, kl_GK = x.seg.sum(mask_T * x.logratio_T), x.seg.sum(mask_T * x.token_kl_T)
        margin_G = u_GK[:, 0] - u_GK[:, 1] - (kl_GK[:, 1] - kl_GK[:, 0])
        return HeadOutput(-logsigmoid(self.beta * margin_G), {"mapo/mask": mask_T})

    def start(self, K: int) -> float:
        return math.log(2)
