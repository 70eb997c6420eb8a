"""RankList, for preferences: each response of a ranking against those up to some places below it.

Paper: Naini et al. 2025, RankList - A Listwise Preference Learning Framework for Predicting Subjective Preferences,
    arXiv:2508.09826.

    loss = sum_i  log( 1 + sum_{j: 0 < place_j - place_i <= skip} exp(r_j - r_i) ),    r_k = b log pi/ref(y_k)

Symbols: b = beta; place = 1 + the number of different rewards above one's own: tied responses share a place; skip: how
    many places down a response is compared, 1 with its next place alone.
Length: sum.
Bounded below: yes, by 0.
Pins the level: no; the gradients of a group add up to 0.
Limits: skip 1 without ties is the sum of DPO (RankNet) over neighbours; skip >= K - 1 is plackett_luce; two responses
    are DPO. Equal rewards, or one response: loss and gradient 0.
Departures: the paper ranks speech and images by a score; the score here is DPO's implicit reward. It exposes longer
    skips as training goes on; here skip is fixed (start a second run from the first to raise it). TRL and HALOs have
    none.
Unverified: the formula. Of the paper only the abstract was at hand: RankNet generalised to lists, local and non-local
    constraints, a log-sum-exp, skip-wise comparisons. This is our reading of these four; do not report it as RankList
    of the paper.
Verified: closed form of the formula above; identities with DPO and plackett_luce. No public code is known.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt
from torch.nn.functional import softplus

from po.numeric import masked_logsumexp
from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class RankList(Head):
    needs: ClassVar[Needs] = Needs(layout="set", reference=True, reward=True)

    beta: Annotated[float, Gt(0)] = 0.1
    skip: Annotated[int, Ge(1)] = 1

    def __call__(self, x: HeadInput) -> HeadOutput:
        valid_GK = x.seg.valid_GK
        r_GK = self.beta * x.logratio_GK
        reward_GK = torch.where(valid_GK, x.reward_GK, torch.inf)
        above_GKK = (reward_GK[:, None, :] > reward_GK[:, :, None]) & valid_GK[:, None, :]  # [g, i, j]: j beats i
        twins_GKK = reward_GK[:, None, :] == reward_GK[:, :, None]
        share_GK = 1 / (twins_GKK & valid_GK[:, None, :]).sum(-1).clamp(min=1)  # tied responses are one place together
        place_GK = torch.where(above_GKK, share_GK[:, None, :], 0).sum(-1).round()
        down_GKK = place_GK[:, None, :] - place_GK[:, :, None]  # [g, i, j]: how far j is below i
        compared_GKK = (down_GKK > 0) & (down_GKK <= self.skip) & valid_GK[:, None, :]
        loss_GK = softplus(masked_logsumexp(r_GK[:, None, :], compared_GKK) - r_GK)
        return HeadOutput(torch.where(valid_GK, loss_GK, 0).sum(-1))

    def start(self, K: int) -> float:
        return sum(math.log1p(min(self.skip, K - 1 - i)) for i in range(K))
