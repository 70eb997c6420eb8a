"""Active Multi-Preference Optimization (AMPO), the loss: the best response against the chosen negatives, no reference.

Paper: Gupta et al. 2025, AMPO: Active Multi-Preference Optimization for Self-play Preference Selection,
    arXiv:2502.18293.

    loss = -log  sum_{k in Y+} exp(z_k) / sum_{all k} exp(z_k),    z_k = b (l_k + a (R_k - mean R)),    Y+ = argmax R
    l_k = log pi(y_k) / |y_k|,  without length_normalize: log pi(y_k)

Symbols: b = beta; a = alpha, in log-probs per unit of reward; R the rewards; |y| the tokens of a response with EOS;
    length_normalize: l is the mean over the response's tokens, and beta belongs to that scale (5 to 10), not to sums.
Length: mean; sum without length_normalize.
Bounded below: yes, by 0.
Pins the level: no; the gradients with respect to l add up to 0 over a group.
Limits: two responses with alpha 0 are SimPO without margin (sums: CPO without NLL). Tied best responses are all in Y+;
    with equal rewards, or one response, there is no negative: loss and gradient 0 (metric ampo/skipped). The mean of
    the rewards cancels.
Departures: the head takes every response of the row, the best as positive and all others as negatives. Which negatives
    a row keeps (BottomK, Coreset, OptSelect) is a choice made with the data. No code of the authors is known; TRL and
    HALOs have none.
Unverified: whether the paper's scores are length-normalised (a secondary source: the betas seen belong to means), where
    beta stands, and the defaults of beta and alpha. One positive and the form of the loss are confirmed by several.
Verified: closed form, sum and mean; vectors of an independent script, no public code to run; identity with DPO.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt
from torch.nn.functional import logsigmoid

from po.numeric import masked_center, masked_logsumexp
from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class AMPO(Head):
    needs: ClassVar[Needs] = Needs(layout="set", reward=True)

    beta: Annotated[float, Gt(0)] = 5.0
    alpha: Annotated[float, Ge(0)] = 0.1
    length_normalize: bool = True

    def __call__(self, x: HeadInput) -> HeadOutput:
        valid_GK = x.seg.valid_GK
        score_GK = x.seg.mean(x.policy_T) if self.length_normalize else x.seg.sum(x.policy_T)
        z_GK = self.beta * (score_GK + self.alpha * masked_center(x.reward_GK, valid_GK))
        reward_GK = torch.where(valid_GK, x.reward_GK, -torch.inf)
        best_GK = (reward_GK == reward_GK.amax(-1, keepdim=True)) & valid_GK
        other_GK = valid_GK & ~best_GK
        loss_G = -logsigmoid(masked_logsumexp(z_GK, best_GK) - masked_logsumexp(z_GK, other_GK))
        some_G = best_GK.any(-1) & other_GK.any(-1)
        return HeadOutput(torch.where(some_G, loss_G, 0), {"ampo/skipped": (~some_G).to(z_GK.dtype)})
