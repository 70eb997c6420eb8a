"""SparsePO: TDPO1 with a learned non-negative weight on every token's log-ratio and on every token's KL.

Paper: Christopoulou et al. 2024, SparsePO: Controlling Preference Alignment of LLMs via Sparse Token Masks,
    arXiv:2410.05102.

    loss = -log s(b [u(y_w) - u(y_l) - (d(y_l) - d(y_w))]) + sum over y_w, y_l of  lu ||m_u(y)||_1 + ld ||m_d(y)||_1
    u(y) = sum_t m_u,t log pi/ref(y_t),    d(y) = sum_t m_d,t KL_t,    KL_t = KL(ref || pi) over the vocabulary
    simple_last: m = ReLU(w . H_L + c);    simple_all: m = ReLU(sum_l q_l ReLU(w_l . LN(H_l) + c_l))

Symbols: s = sigmoid; b = beta; lu = lambda_u, ld = lambda_d; H_l the reference's hidden state after layer l, where it
    predicts the token; mask: what m is computed from, all layers (one LayerNorm shared among them) or the last;
    common: one network makes m_u = m_d and both lambdas are halved, else each mask has its own.
Length: sum, of log-ratios, of KL_t and of the L1 norms, so long responses pay more of the penalty.
Bounded below: yes, by 0.
Pins the level: no; only differences of masked sums count.
Limits: m = 1 is TDPO1, m_u = 1 and m_d = 0 is DPO; m = 0 everywhere has loss log 2 and teaches nothing, for good if the
    ReLUs are dead (`sparsepo/on_u`, `on_d`: the share of tokens with a weight). Masks have no upper bound: without L1
    they may grow in the policy's stead. They start near 0, and the policy moves as fast as they grow.
Departures: the weights q of simple_all start positive (absolute values of the authors' draws), because masks whose q
    are all negative never wake up; else initialisation is the authors' code's: normal with deviation 0.02, biases 0.
    LayerNorm's epsilon is 1e-5, not the model's. No dropout: the authors' default switches their masks' off. Their
    two-layer, random and binary masks and masks on only one of the two sums are not here; MaPO is the head `mapo`. They
    log rewards with the KL of opposite sign. TRL and HALOs have no SparsePO.
Verified: closed form; a vector, with gradients for logits and masks, on which the authors' executed code agrees;
    identities with TDPO1 and DPO. The mask networks were compared with the authors' code by reading, not by running.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from po.types import Head, HeadInput, HeadOutput, Needs

_STD = 0.02  # of GPT-2's and Pythia's weights, which the authors' masks are initialised like


class Mask(nn.Module):
    """Hidden states (T, L, D) of embeddings and layers -> one weight >= 0 per token (T,)."""

    def __init__(self, hidden_size: int, layers: int, last: bool) -> None:
        super().__init__()
        self.last = last
        self.weight = nn.Parameter(_STD * torch.randn(1 if last else layers - 1, hidden_size))
        self.bias = nn.Parameter(torch.zeros(self.weight.shape[0]))
        if not last:
            self.norm = nn.LayerNorm(hidden_size)
            self.mix = nn.Parameter(_STD * torch.randn(layers - 1).abs())

    def forward(self, hidden_TLD: Tensor) -> Tensor:
        if self.last:
            return (hidden_TLD[:, -1] @ self.weight[0] + self.bias[0]).relu()
        layer_TL: Tensor = (torch.linalg.vecdot(self.norm(hidden_TLD[:, 1:]), self.weight) + self.bias).relu()
        return (layer_TL @ self.mix).relu()


class Masks(nn.Module):
    """The two masks by name; with common, one network under both names."""

    def __init__(self, hidden_size: int, layers: int, last: bool, common: bool) -> None:
        super().__init__()
        self.common = common
        self.masks = nn.ModuleList(Mask(hidden_size, layers, last) for _ in range(1 if common else 2))

    def forward(self, hidden_TLD: Tensor) -> dict[str, Tensor]:
        made = [mask(hidden_TLD) for mask in self.masks]
        return {"mask_u": made[0], "mask_d": made[-1]}


@dataclass(frozen=True)
class SparsePO(Head):
    needs: ClassVar[Needs] = Needs(layout="pair", reference=True, token_kl=True, hidden="ref")

    beta: Annotated[float, Gt(0)] = 0.1
    lambda_u: Annotated[float, Ge(0)] = 0.0
    lambda_d: Annotated[float, Ge(0)] = 0.0
    mask: Literal["simple_all", "simple_last"] = "simple_all"
    common: bool = True

    def build(self, hidden_size: int, layers: int) -> nn.Module:
        return Masks(hidden_size, layers, self.mask == "simple_last", self.common)

    def __call__(self, x: HeadInput) -> HeadOutput:
        u_T, d_T = x.gate_T("mask_u"), x.gate_T("mask_d")
        u_GK, kl_GK = x.seg.sum(u_T * x.logratio_T), x.seg.sum(d_T * x.token_kl_T)
        margin_G = u_GK[:, 0] - u_GK[:, 1] - (kl_GK[:, 1] - kl_GK[:, 0])
        half = 0.5 if self.common else 1.0
        l1_G = x.seg.sum(half * (self.lambda_u * u_T.abs() + self.lambda_d * d_T.abs())).sum(-1)
        metrics = {
            "sparsepo/on_u": (u_T > 0).to(l1_G.dtype),
            "sparsepo/on_d": (d_T > 0).to(l1_G.dtype),
            "sparsepo/mask_u": u_T.detach(),
            "sparsepo/mask_d": d_T.detach(),
            "sparsepo/l1": l1_G.detach(),
        }
        return HeadOutput(l1_G - logsigmoid(self.beta * margin_G), metrics)

    def start(self, K: int) -> float | None:
        return math.log(2) if self.lambda_u == self.lambda_d == 0 else None
