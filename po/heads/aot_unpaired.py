"""Alignment via Optimal Transport, unpaired: good responses' rewards are to dominate bad ones', as distributions.

Paper: Melnyk et al. 2024, Distributional Preference Alignment of LLMs via Optimal Transport, arXiv:2406.05882.

    loss = -log s(b (u_(i) - v_(i))),    u = log pi/ref(y_w),    v = log pi/ref(y_l)

Symbols: s = sigmoid; b = beta; u_(i) the i-th smallest u of the optimizer step, v_(i) the i-th smallest v; y_w a better
    response, y_l a worse one. The loss belongs to the pair that has u_(i).
Length: sum.
Bounded below: yes, by 0.
Pins the level: no.
Limits: which response was preferred to which does not count, only that there are as many of each; a step of one pair is
    DPO. With many pairs in a step the order changes as the policy moves. Ties keep the order of the batch.
Departures: fed with pairs, as TRL 1.16 `aot_unpaired` (older TRL: `aot_pair`), so that both sides are of one size;
    single labelled responses would need quantiles of unequal samples. Sorted over the whole step; TRL sorts a
    micro-batch. TRL's label_smoothing is not there.
Unverified: other losses than the logistic one, which the paper may allow; its text was not at hand.
Verified: closed form; a vector on which the executed code of TRL 1.16 agrees.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Gt
from torch.nn.functional import logsigmoid

from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class AOTUnpaired(Head):
    needs: ClassVar[Needs] = Needs(layout="pair", reference=True, couples_batch=True)

    beta: Annotated[float, Gt(0)] = 0.01

    def __call__(self, x: HeadInput) -> HeadOutput:
        valid_G = x.seg.valid_GK.all(-1)  # empty groups go last in both orders
        u_G, v_G = x.logratio_GK.unbind(-1)
        order_u, order_v = (torch.where(valid_G, r.detach(), torch.inf).argsort(stable=True) for r in (u_G, v_G))
        gap_G = u_G - v_G[order_v][order_u.argsort()]
        return HeadOutput(-logsigmoid(self.beta * gap_G), {"aot_unpaired/gap": gap_G.detach()})

    def start(self, K: int) -> float:
        return math.log(2)
