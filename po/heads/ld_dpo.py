"""LD-DPO (length-desensitised): tokens beyond the length of the shorter response count less.

Paper: Liu et al. 2024, Length Desensitization in Direct Preference Optimization, arXiv:2409.06411.

    loss = -log s(b [u(y_w) - u(y_l)]),    u(y) = sum_{i <= m} d_i + a sum_{i > m} d_i,
        d_i = log pi/ref(y_i),    m = min(|y_w|, |y_l|)

Symbols: s = sigmoid; b = beta; a = alpha, the weight of the longer response's tail; |y| the tokens, EOS included; y_w
    the better response, y_l the worse. The metric ld_dpo/tail is the share of tokens that are in a tail.
Length: sum, the longer response's tail weighted by alpha.
Bounded below: yes, by 0.
Pins the level: no.
Limits: alpha = 1 is DPO; alpha = 0 cuts both responses to one length; pairs of equal length are DPO's.
Departures: none known; policy and reference are weighted alike, as in TRL 1.16 `ld_alpha` (which can weight other
    losses too). HALOs has none.
Unverified: the default alpha (the paper tunes it per model); the text of the paper was not at hand.
Verified: closed form; a vector, down to logits, on which the executed code of TRL 1.16 agrees; identity with DPO.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Le
from torch.nn.functional import logsigmoid

from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class LDDPO(Head):
    needs: ClassVar[Needs] = Needs(layout="pair", reference=True)

    beta: Annotated[float, Gt(0)] = 0.1
    alpha: Annotated[float, Ge(0), Le(1)] = 0.5

    def __call__(self, x: HeadInput) -> HeadOutput:
        d_T, length_GK = x.logratio_T, x.seg.length_GK
        first_GK = length_GK.flatten().cumsum(0).view_as(length_GK) - length_GK  # responses lie in slot order
        place_T = torch.arange(d_T.numel(), device=d_T.device) - x.seg.spread(first_GK)
        tail_T = place_T >= x.seg.spread(length_GK.amin(-1, keepdim=True).expand_as(length_GK))
        chosen_G, rejected_G = x.seg.sum(torch.where(tail_T, self.alpha * d_T, d_T)).unbind(-1)
        loss_G = -logsigmoid(self.beta * (chosen_G - rejected_G))
        return HeadOutput(loss_G, {"ld_dpo/tail": tail_T.to(d_T.dtype)})

    def start(self, K: int) -> float:
        return math.log(2)
