"""HyPO: DPO on offline pairs, plus KL(pi || ref) by samples of the policy itself.

Paper: Song et al. 2024, The Importance of Online Data: Understanding Preference Fine-tuning via Coverage,
    arXiv:2406.01462.

    loss = -log s(b h) + lam (1/k) sum_i log pi(y^i) (u(y^i) - c_i),    h = u(y_w) - u(y_l),    u(y) = log pi/ref(y)

Symbols: s = sigmoid; b = beta; lam, the weight of the KL (lambda); y_w the response labelled desirable, y_l the one
    labelled undesirable (of several of a kind, the mean of u); y^1 .. y^k the unlabelled ones, sampled from the policy;
    u(y^i) - c_i is a constant; estimator: "rloo" has c_i = mean of the other samples' u, "reinforce" c_i = 0.
Length: sum.
Bounded below: no; the second term is made for its gradient, and its value is not the KL. The metric hypo_kl/kl is.
Pins the level: no for the pair; the KL does, where the samples are.
Limits: lam = 0, or no samples, is DPO. A single sample has no others: c = 0. The samples must come from the current
    policy; on stored ones the gradient is biased. A prompt without a pair has the second term alone.
Departures: none known in structure. This is not Hybrid-DPO (arXiv:2602.11902), which is called HyPO as well and clips
    the reference's margin.
Unverified: lam = 1e-4 and two samples a prompt, and which baseline the paper prefers; only its abstract
    and secondary sources were read.
Verified: closed form; vectors of an independent script (no public code was executed); identity with DPO; the mean
    over a whole vocabulary is the KL's gradient.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt
from torch.nn.functional import logsigmoid

from po.numeric import masked_mean
from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class HyPOKL(Head):
    needs: ClassVar[Needs] = Needs(layout="labelled", reference=True, label=True, raw_logps=True, stops_gradient=True)

    beta: Annotated[float, Gt(0)] = 0.1
    lam: Annotated[float, Ge(0)] = 1e-4
    estimator: Literal["rloo", "reinforce"] = "rloo"

    def __call__(self, x: HeadInput) -> HeadOutput:
        u_GK = x.logratio_GK
        better_GK, worse_GK, sample_GK = (x.seg.valid_GK & (x.label_GK == side) for side in (1, -1, 0))
        margin_G = self.beta * (masked_mean(u_GK, better_GK) - masked_mean(u_GK, worse_GK))
        pair_G = better_GK.any(-1) & worse_GK.any(-1)
        d_GK = torch.where(sample_GK, u_GK.detach(), 0)
        others_G1 = (sample_GK.sum(-1, keepdim=True) - 1).clamp(min=1)
        baseline_GK = (d_GK.sum(-1, keepdim=True) - d_GK) / others_G1 if self.estimator == "rloo" else 0
        kl_G = masked_mean(x.seg.sum(x.policy_T) * (d_GK - baseline_GK), sample_GK)
        loss_G = torch.where(pair_G, -logsigmoid(margin_G), 0) + self.lam * kl_G
        return HeadOutput(loss_G, {"hypo_kl/kl": masked_mean(d_GK, sample_GK)})

    def start(self, K: int) -> float:
        return math.log(2) if K > 1 else 0.0
