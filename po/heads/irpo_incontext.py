"""In-context Ranking Preference Optimization (IRPO): every item of a list against all others, weighted as in DCG.

Paper: Wu et al. 2025, In-context Ranking Preference Optimization, arXiv:2504.15477.

    loss = (1/K) sum_i  w_i  -log s( log(K - 1) - log sum_{j != i} exp(b (u_j - u_i)) ),    u = log pi/ref(y)
    w_i = (2^R_i - 1) / log2(1 + rank_i)

Symbols: s = sigmoid; b = beta; R the rewards, read as relevances: 0 is irrelevant, 1 to 4 are usual; rank_i = 1 + the
    number of responses with a higher reward, so that tied responses weigh the same; K the responses of this group.
Length: sum.
Bounded below: yes, by 0.
Pins the level: no; the gradients of a group add up to 0.
Limits: two responses with relevances 1 and 0 are half of DPO. One response, or relevances all 0: loss and gradient 0.
    At policy == reference the loss is log 2 times the mean weight (metric irpo_incontext/weight).
Departures: the authors' code sums over the prompts of a batch (its learning rate grows with the batch) where po
    averages, and masks j = i by taking 100 off before the product with beta, which leaks for small beta; ours is exact.
    Relevances are clamped to [0, 30]: below 0 a weight would turn its item's preference round. A response is an item of
    the list here; Iterative Reasoning PO is also called IRPO and is DPO with an SFT term.
Unverified: that rank is the order by relevance and not the place in the displayed list; the two agree on the vector.
Verified: closed form; a vector on which the authors' executed code agrees; identity with DPO.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Gt
from torch.nn.functional import softplus

from po.numeric import masked_logsumexp, masked_mean
from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class IRPOInContext(Head):
    needs: ClassVar[Needs] = Needs(layout="set", reference=True, reward=True)

    beta: Annotated[float, Gt(0)] = 1.0

    def __call__(self, x: HeadInput) -> HeadOutput:
        valid_GK = x.seg.valid_GK
        reward_GK = torch.where(valid_GK, x.reward_GK, -torch.inf)
        rank_GK = 1 + (reward_GK[:, None, :] > reward_GK[:, :, None]).sum(-1)  # [g, i, j]: j beats i
        gain_GK = torch.exp2(reward_GK.clamp(0, 30)) - 1
        weight_GK = gain_GK / torch.log2(1 + rank_GK.to(gain_GK.dtype))
        r_GK = self.beta * x.logratio_GK
        itself_KK = torch.eye(r_GK.shape[-1], dtype=torch.bool, device=r_GK.device)
        rivals_GK = masked_logsumexp(r_GK[:, None, :], valid_GK[:, None, :] & ~itself_KK)
        others_G = (valid_GK.sum(-1) - 1).clamp(min=1).to(r_GK.dtype)
        loss_GK = weight_GK * softplus(rivals_GK - r_GK - others_G.log()[:, None])
        return HeadOutput(masked_mean(loss_GK, valid_GK), {"irpo_incontext/weight": masked_mean(weight_GK, valid_GK)})
