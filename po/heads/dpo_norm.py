"""Length-normalised DPO: a response counts by the mean, not the sum, of its tokens' log-ratios.

Paper: Lambert et al. 2024, Tulu 3: Pushing Frontiers in Open Language Model Post-Training, arXiv:2411.15124.

    loss = -log s(b [u(y_w) - u(y_l)]),    u(y) = (1/|y|) sum_i log pi/ref(y_i)

Symbols: s = sigmoid; b = beta, on the scale of one token, so some 50 times DPO's; |y| the tokens, EOS included; y_w the
    better response, y_l the worse. The metric dpo_norm/margin is b [u(y_w) - u(y_l)]; the rewards/* that every head
    logs are b times sums.
Length: mean.
Bounded below: yes, by 0.
Pins the level: no.
Limits: for responses of one length n it is DPO with beta / n.
Departures: none known; as TRL 1.16 `sigmoid_norm` and open-instruct's `dpo_norm`. HALOs has none.
Verified: closed form; a vector on which the executed code of TRL 1.16 agrees; identity with DPO.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Gt
from torch.nn.functional import logsigmoid

from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class DPONorm(Head):
    needs: ClassVar[Needs] = Needs(layout="pair", reference=True)

    beta: Annotated[float, Gt(0)] = 5.0

    def __call__(self, x: HeadInput) -> HeadOutput:
        chosen_G, rejected_G = x.seg.mean(x.logratio_T).unbind(-1)
        margin_G = self.beta * (chosen_G - rejected_G)
        return HeadOutput(-logsigmoid(margin_G), {"dpo_norm/margin": margin_G.detach()})

    def start(self, K: int) -> float:
        return math.log(2)
