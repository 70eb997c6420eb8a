"""Multi-sample DPO (mDPO): a group of better responses against a group of worse ones, by their mean log-ratio.

Paper: Wang et al. 2024, Preference Optimization with Multi-Sample Comparisons, arXiv:2410.12138.

    loss = -log s(b (mean_{k in W} u_k - mean_{k in L} u_k)),    u_k = log pi/ref(y_k)

Symbols: s = sigmoid; b = beta; W the responses labelled +1, L those labelled -1, of any two sizes; a response labelled
    0 is not read.
Length: sum.
Bounded below: yes, by 0.
Pins the level: no; the gradients of a group add up to 0.
Limits: one response on each side is DPO. A group that lacks a side has loss and gradient 0, and the metric
    mdpo_multisample/skipped (share of such groups) says so.
Departures: the paper has k responses on each side; here the sides may differ. The log-sigmoid of a mean is a biased
    estimate of that of the expectation. The multimodal "mDPO" is another method. TRL and HALOs have none.
Unverified: the formula; the paper's text and code were not at hand (abstract, a review and a summary support it).
Verified: closed form; a vector of an independent script, no public code to run; identity with DPO.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Gt
from torch.nn.functional import logsigmoid

from po.numeric import masked_mean
from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class MDPOMultisample(Head):
    needs: ClassVar[Needs] = Needs(layout="labelled", reference=True, label=True)

    beta: Annotated[float, Gt(0)] = 0.1

    def __call__(self, x: HeadInput) -> HeadOutput:
        better_GK = (x.label_GK > 0) & x.seg.valid_GK
        worse_GK = (x.label_GK < 0) & x.seg.valid_GK
        u_GK = x.logratio_GK
        margin_G = self.beta * (masked_mean(u_GK, better_GK) - masked_mean(u_GK, worse_GK))
        both_G = better_GK.any(-1) & worse_GK.any(-1)
        metrics = {"mdpo_multisample/skipped": (~both_G).to(u_GK.dtype)}
        return HeadOutput(torch.where(both_G, -logsigmoid(margin_G), 0), metrics)

    def start(self, K: int) -> float:
        return math.log(2)
