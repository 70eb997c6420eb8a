"""TPO-L: Triple Preference Optimization with SimPO's contrast: mean log-probs and a target margin.

Paper: Saeidi et al. 2024, Triple Preference Optimization: Achieving Better Alignment using a Single Step Optimization,
    arXiv:2405.16681.

    loss = -log s(b (m(y_w) - m(y_l)) - g) - a m(y_g),    m(y) = (1/|y|) sum_i log pi(y_i)

Symbols: s = sigmoid; b = beta, per token; g = gamma, the target margin; a = alpha, the weight of the gold response's
    likelihood; y_g the gold response, the one with the highest reward; y_w, with the second highest; y_l, with the
    lowest; |y| the tokens of y, EOS included.
Length: mean.
Bounded below: yes, by 0.
Pins the level: yes, upwards, by the likelihood; with alpha = 0 no.
Limits: two responses: y_g = y_w; with alpha = 0 that is SimPO. One response: its likelihood alone, and a constant. Ties
    go by place: the first is the better.
Departures: sets of scored responses instead of rows with named ones. The likelihood averages over the response's own
    tokens, then over prompts; the authors' code and TRL 1.16 (`tpo-l`) average over all tokens of the micro-batch.
Unverified: the paper's own values; its text was not at hand. beta 2 is SimPO's, gamma 0.5 the authors' code's.
Verified: closed form; a vector of an independent script with alpha 0; TRL 1.16's `tpo-l` was read.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt
from torch.nn.functional import logsigmoid

from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class TPOL(Head):
    needs: ClassVar[Needs] = Needs(layout="set", reward=True)

    beta: Annotated[float, Gt(0)] = 2.0
    gamma: Annotated[float, Ge(0)] = 0.5
    alpha: Annotated[float, Ge(0)] = 1.0

    def __call__(self, x: HeadInput) -> HeadOutput:
        valid_GK = x.seg.valid_GK
        best_first_GK = torch.where(valid_GK, -x.reward_GK, torch.inf).argsort(dim=-1, stable=True)
        last_G1 = (valid_GK.sum(-1, keepdim=True) - 1).clamp(min=0)
        rank_GR = torch.cat([torch.zeros_like(last_G1), (last_G1 > 1).long(), last_G1], -1)
        index_GR = best_first_GK.gather(-1, rank_GR)  # gold, chosen, rejected
        gold_G, chosen_G, rejected_G = x.seg.mean(x.policy_T).gather(-1, index_GR).unbind(-1)
        margin_G = self.beta * (chosen_G - rejected_G) - self.gamma
        return HeadOutput(-logsigmoid(margin_G) - self.alpha * gold_G, {"tpo_l/margin": margin_G.detach()})
