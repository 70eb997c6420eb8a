"""Alignment via Optimal Transport, paired: the policy's margins are to dominate the reference's, as distributions.

Paper: Melnyk et al. 2024, Distributional Preference Alignment of LLMs via Optimal Transport, arXiv:2406.05882.

    loss = -log s(b (u_(i) - v_(i))),    u = log pi(y_w) - log pi(y_l),    v = log ref(y_w) - log ref(y_l)

Symbols: s = sigmoid; b = beta; u_(i) the i-th smallest u of the optimizer step, v_(i) the i-th smallest v; y_w the
    better response, y_l the worse. The loss belongs to the pair that has u_(i).
Length: sum.
Bounded below: yes, by 0.
Pins the level: no.
Limits: margins are compared by rank, not pair by pair, so a step needs many pairs; a step of one pair is DPO. At policy
    == reference both orders agree and the loss is DPO's. Ties keep the order of the batch.
Departures: sorted over the whole step; TRL 1.16 `aot` sorts a micro-batch. TRL's label_smoothing is not there.
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
class AOT(Head):
    needs: ClassVar[Needs] = Needs(layout="pair", reference=True, raw_logps=True, couples_batch=True)

    beta: Annotated[float, Gt(0)] = 0.01

    def __call__(self, x: HeadInput) -> HeadOutput:
        valid_G = x.seg.valid_GK.all(-1)  # empty groups go last in both orders
        u_G, v_G = (b - w for b, w in (x.seg.sum(logp_T).unbind(-1) for logp_T in (x.policy_T, x.ref_T)))
        order_u, order_v = (torch.where(valid_G, m, torch.inf).argsort(stable=True) for m in (u_G.detach(), v_G))
        gap_G = u_G - v_G[order_v][order_u.argsort()]
        return HeadOutput(-logsigmoid(self.beta * gap_G), {"aot/gap": gap_G.detach()})

    def start(self, K: int) -> float:
        return math.log(2)
