"""Triple Preference Optimization: a contrast of a good and a bad response, plus the likelihood of a third, the best.

Paper: Saeidi et al. 2024, Triple Preference Optimization: Achieving Better Alignment using a Single Step Optimization,
    arXiv:2405.16681.

    loss = -log s(b (log pi(y_w) - log pi(y_l))) - a (1/|y_g|) log pi(y_g)

Symbols: s = sigmoid; b = beta; a = alpha, the weight of the gold response's likelihood (TRL: tpo_alpha); y_g the gold
    response, the one with the highest reward; y_w, with the second highest; y_l, with the lowest; |y_g| the tokens of
    y_g, EOS included.
Length: sum in the contrast, mean in the likelihood.
Bounded below: yes, by 0.
Pins the level: yes, upwards, by the likelihood; with alpha = 0 no.
Limits: two responses: y_g = y_w, which is CPO. One response: its likelihood alone, and log 2. Ties go by place: the
    first is the better.
Departures: sets of scored responses instead of rows with named ones. The likelihood averages over the response's own
    tokens, then over prompts; the authors' code and TRL 1.16 average over all tokens of the micro-batch. The defaults
    are TRL's; the authors' config has beta 0.1 and alpha 0.05.
Unverified: the paper's own values; its text was not at hand.
Verified: closed form; a vector with alpha 0 on which the authors' executed code agrees.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt
from torch.nn.functional import logsigmoid

from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class TPOTriple(Head):
    needs: ClassVar[Needs] = Needs(layout="set", reward=True)

    beta: Annotated[float, Gt(0)] = 0.01
    alpha: Annotated[float, Ge(0)] = 1.0

    def __call__(self, x: HeadInput) -> HeadOutput:
        valid_GK = x.seg.valid_GK
        best_first_GK = torch.where(valid_GK, -x.reward_GK, torch.inf).argsort(dim=-1, stable=True)
        last_G1 = (valid_GK.sum(-1, keepdim=True) - 1).clamp(min=0)
        rank_GR = torch.cat([torch.zeros_like(last_G1), (last_G1 > 1).long(), last_G1], -1)
        index_GR = best_first_GK.gather(-1, rank_GR)  # gold, chosen, rejected
        _, chosen_G, rejected_G = x.seg.sum(x.policy_T).gather(-1, index_GR).unbind(-1)
        nll_G = -x.seg.mean(x.policy_T).gather(-1, index_GR)[:, 0]
        contrast_G = -logsigmoid(self.beta * (chosen_G - rejected_G))
        return HeadOutput(contrast_G + self.alpha * nll_G, {"tpo_triple/nll": nll_G.detach()})
