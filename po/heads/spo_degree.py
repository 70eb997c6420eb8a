"""Self-supervised Preference Optimization: DPO, and telling from the hidden states how much of a response was removed.

Paper: Li et al. 2024, Self-supervised Preference Optimization: Enhance Your Language Model with Preference Degree
    Awareness, arXiv:2409.17791.

    loss = -log s(b (mean_{W} u - mean_{L} u))  +  c  mean_k  -log softmax(z_k)_{d_k},    u = log pi/ref(y)
    z_k = mean over the tokens of y_k of  A h_t + a

Symbols: s = sigmoid; b = beta; c = gamma; W and L the responses labelled +1 and -1; d the degree of removal: 0 for
    labelled responses, the row's number `removed` (0 to classes - 1, clamped) for its responses labelled 0, which are
    copies with key content taken out; classes: how many degrees; h_t the policy's last hidden state that predicts token
    t; A, a a linear layer trained along.
Length: sum (DPO), mean (degrees).
Bounded below: yes, by 0.
Pins the level: no; the removed copies' log-probs do not count.
Limits: gamma 0 is mdpo_multisample, and DPO with one response on each side. A group that lacks a side has no first
    term. spo_degree/accuracy is the share of degrees told right; 1 / classes is chance.
Departures: the alignment term is DPO's; the paper combines its auxiliary loss with several.
Unverified: all but the idea, of which the abstract speaks: the classifier and where it reads, what is removed and how
    much, which responses are classified, gamma and the number of degrees are ours, as the authors' repository has no
    code. Do not report it as the paper's method.
Verified: closed form of the formula above; identities with mdpo_multisample and DPO. No public code is known.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from po.numeric import masked_mean
from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class SPODegree(Head):
    needs: ClassVar[Needs] = Needs(layout="labelled", reference=True, label=True, columns=("removed",), hidden="policy")

    beta: Annotated[float, Gt(0)] = 0.1
    gamma: Annotated[float, Ge(0)] = 0.1
    classes: Literal[2, 3, 4, 5] = 4

    def __call__(self, x: HeadInput) -> HeadOutput:
        valid_GK, label_GK, u_GK = x.seg.valid_GK, x.label_GK, x.logratio_GK
        better_GK, worse_GK = (label_GK > 0) & valid_GK, (label_GK < 0) & valid_GK
        margin_G = self.beta * (masked_mean(u_GK, better_GK) - masked_mean(u_GK, worse_GK))
        align_G = torch.where(better_GK.any(-1) & worse_GK.any(-1), -logsigmoid(margin_G), 0)
        z_GKC = torch.stack([x.seg.mean(x.gate_T(f"degree_{c}")) for c in range(self.classes)], -1)
        removed_GK = torch.where((label_GK == 0) & valid_GK, x.column_G("removed")[:, None], 0)
        degree_GK = removed_GK.round().clamp(0, self.classes - 1).long()
        nll_GK = -z_GKC.log_softmax(-1).gather(-1, degree_GK[..., None])[..., 0]
        right_GK = (z_GKC.argmax(-1) == degree_GK).to(u_GK.dtype)
        loss_G = align_G + self.gamma * masked_mean(nll_GK, valid_GK)
        return HeadOutput(loss_G, {"spo_degree/accuracy": masked_mean(right_GK, valid_GK)})

    def build(self, hidden_size: int, layers: int) -> nn.Module:
        return _Degrees(hidden_size, self.classes)


class _Degrees(nn.Module):
    def __init__(self, hidden_size: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, classes)

    def forward(self, hidden_TLD: Tensor) -> dict[str, Tensor]:
        return {f"degree_{c}": z_T for c, z_T in enumerate(self.linear(hidden_TLD[:, -1]).unbind(-1))}
