"""Multi-Preference Optimization (MPO, first called SWEPO): the responses above the group's mean reward against all.

Paper: Gupta et al. 2024, Multi-Preference Optimization: Generalizing DPO via Set-Level Contrasts, arXiv:2412.04628.

    loss = -log  sum_{k in Y+} w_k exp(b u_k)  /  sum_{all k} w_k exp(b u_k),    u_k = log pi/ref(y_k)
    w_k = exp(a |D_k|^p),  signed: exp(a D_k^p);    D_k = R_k - mean R;    Y+ = {k: D_k > 0}

Symbols: b = beta; a = alpha, the weight of a deviation (standardise rewards: on raw 1-10 scores it saturates); R the
    rewards; p = power: 0 is W-0 (no weights, alpha cancels), 1 is W-1, 2 is W-2; signed: with p = 1, very bad responses
    are weighted down instead of up (REFA's form; no difference for p = 0 and 2).
Length: sum.
Bounded below: yes, by 0.
Pins the level: no; the gradients of a group add up to 0.
Limits: K = 2 with W-0 is DPO, with signed W-1 DPO with the margin a (R_w - R_l); one positive with W-0 is InfoNCA with
    alpha -> inf. Equal rewards, or one response: Y+ is empty, the group counts with loss and gradient 0, and the metric
    mpo_multi/skipped (share of such groups) says so; mpo_multi/positives is the size of Y+.
Departures: no code of the authors is known; HALOs has none. The literature calls a second method MPO: TRL's "MPO" is
    mixed preference optimization, a weighted sum of DPO, BCO and SFT losses, which a recipe writes as three terms.
Unverified: the weight of the negatives (abs is our reading of the abstract, signed is REFA's), the map of p to W-p, and
    the defaults of beta and alpha. W-0, the split at the mean and the form of the loss are confirmed by other sources.
Verified: closed form only (there is no public counterpart to run); identities with DPO and InfoNCA.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt
from torch.nn.functional import logsigmoid

from po.numeric import masked_center, masked_logsumexp
from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class MPOMulti(Head):
    needs: ClassVar[Needs] = Needs(layout="set", reference=True, reward=True)

    beta: Annotated[float, Gt(0)] = 0.1
    alpha: Annotated[float, Ge(0)] = 1.0
    power: Literal[0, 1, 2] = 1
    signed: bool = False

    def __call__(self, x: HeadInput) -> HeadOutput:
        deviation_GK = masked_center(x.reward_GK, x.seg.valid_GK)
        above_GK = deviation_GK > 0
        below_GK = ~above_GK & x.seg.valid_GK
        size_GK = deviation_GK if self.signed else deviation_GK.abs()
        z_GK = self.beta * x.logratio_GK + self.alpha * size_GK**self.power
        margin_G = masked_logsumexp(z_GK, above_GK) - masked_logsumexp(z_GK, below_GK)
        some_G = above_GK.any(-1)
        metrics = {
            "mpo_multi/positives": above_GK.sum(-1).to(z_GK.dtype),
            "mpo_multi/skipped": (~some_G).to(z_GK.dtype),
        }
        return HeadOutput(torch.where(some_G, -logsigmoid(margin_G), 0), metrics)
