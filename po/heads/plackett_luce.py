"""DPO for full rankings: the likelihood of the order by reward under the Plackett-Luce model.

Paper: Rafailov et al. 2023, Direct Preference Optimization: Your Language Model is Secretly a Reward Model,
    arXiv:2305.18290, appendix on Plackett-Luce.

    loss = sum_i  log( exp(r_i) + sum_{j: R_j < R_i} exp(r_j) ) - r_i,    r_k = b log pi/ref(y_k)

Symbols: b = beta; R the rewards, of which only the order counts.
Length: sum.
Bounded below: yes, by 0.
Pins the level: no; the gradients of a group add up to 0.
Limits: two responses are DPO. Without ties this is minus the log-likelihood of drawing the responses one after the
    other without replacement, best first; at policy == reference it is log K!. Tied responses do not compete, so a
    group of equal rewards, or of one response, has loss and gradient 0.
Departures: none known; the paper has no ties. Not divided by K: a longer ranking counts for more. TRL and HALOs have
    none.
Unverified: the treatment of ties is ours.
Verified: closed form; identities with DPO and with the product of draws.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Gt

from po.numeric import masked_logsumexp
from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class PlackettLuce(Head):
    needs: ClassVar[Needs] = Needs(layout="set", reference=True, reward=True)

    beta: Annotated[float, Gt(0)] = 0.1

    def __call__(self, x: HeadInput) -> HeadOutput:
        valid_GK = x.seg.valid_GK
        r_GK = self.beta * x.logratio_GK
        worse_GKK = (x.reward_GK[:, None, :] < x.reward_GK[:, :, None]) & valid_GK[:, None, :]  # [g, i, j]: i beats j
        itself_KK = torch.eye(r_GK.shape[-1], dtype=torch.bool, device=r_GK.device)
        left_GK = masked_logsumexp(r_GK[:, None, :], worse_GKK | itself_KK)
        return HeadOutput(torch.where(valid_GK, left_GK - r_GK, 0).sum(-1))

    def start(self, K: int) -> float:
        return math.lgamma(K + 1)
