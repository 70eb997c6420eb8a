"""D2O: away from a bad response, anchored on the mean of the model's own samples instead of on a good one.

Paper: Duan et al. 2024, Negating Negatives: Alignment with Human Negative Samples via Distributional Dispreference
    Optimization, arXiv:2403.03419.

    loss = -log s( b mean_i u(y_i) - a u(y_l) ),    u(y) = log pi/ref(y)

Symbols: s = sigmoid; b = beta, a = alpha; y_i the model's own samples (labelled desirable), y_l the bad response
    (labelled undesirable; the mean of u where there are several).
Length: sum.
Bounded below: yes, by 0.
Pins the level: no, with a = b; only the difference counts.
Limits: one sample and a = b is DPO. A prompt that lacks either side has loss 0; d2o/skipped is the share of such
    prompts.
Departures: the paper has two references: a harmful one under the samples (the policy that made them) and a helpful one
    under y_l. Here one reference serves both.
Unverified: alpha = beta = 0.1 and 11 samples a prompt come from a third-party implementation, and so does the formula.
Verified: closed form; a vector of an independent script (its two references are given as one here, which only shifts
    the log-ratios; no public code was executed); identity with DPO.
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
class D2O(Head):
    needs: ClassVar[Needs] = Needs(layout="labelled", reference=True, label=True)

    alpha: Annotated[float, Gt(0)] = 0.1
    beta: Annotated[float, Gt(0)] = 0.1

    def __call__(self, x: HeadInput) -> HeadOutput:
        own_GK, bad_GK = (x.seg.valid_GK & side_GK for side_GK in (x.label_GK > 0, x.label_GK < 0))
        u_GK = x.logratio_GK
        margin_G = self.beta * masked_mean(u_GK, own_GK) - self.alpha * masked_mean(u_GK, bad_GK)
        both_G = own_GK.any(-1) & bad_GK.any(-1)
        skipped_G = (~both_G).to(u_GK.dtype)
        return HeadOutput(torch.where(both_G, -logsigmoid(margin_G), 0), {"d2o/skipped": skipped_G})

    def start(self, K: int) -> float:
        return math.log(2) if K > 1 else 0.0
