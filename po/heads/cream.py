"""CREAM: conservative DPO whose trust in a pair's label is how well two generations of the model agree on its ranking.

Paper: Wang et al. 2024, CREAM: Consistency Regularized Self-Rewarding Language Models, arXiv:2410.12735.

    loss = -C log s(b h) - (1 - C) log s(-b h),    h = log pi/ref(y_w) - log pi/ref(y_l),    C = (1 + T) / 2

Symbols: s = sigmoid; b = beta; T Kendall's rank correlation between the rankings of a prompt's responses by the current
    and by the previous model; C is the row's column "consistency", from 0 to 1, and the metric cream/consistency; y_w
    the better response by the current model, y_l the worse.
Length: sum.
Bounded below: yes, by the entropy of (C, 1 - C).
Pins the level: no.
Limits: C = 1 is DPO, C = 1 - e is cDPO with label_smoothing e. Below 1/2 the preference is reversed; at 1/2 the pair is
    held at h = 0.
Departures: C comes with the data, whichever way it was averaged; the paper's default is one mean over the data set
    (give every row that), per-prompt values are its dynamic variant. TRL and HALOs have none. The authors' code can
    pair the consistency of one prompt with another where a prompt was skipped.
Verified: closed form; vectors without public counterpart (the authors' code was read, not executed); identities with
    DPO and cDPO.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Gt
from torch.nn.functional import logsigmoid

from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class CREAM(Head):
    needs: ClassVar[Needs] = Needs(layout="pair", reference=True, columns=("consistency",))

    beta: Annotated[float, Gt(0)] = 0.1

    def __call__(self, x: HeadInput) -> HeadOutput:
        chosen_G, rejected_G = x.logratio_GK.unbind(-1)
        margin_G, c_G = self.beta * (chosen_G - rejected_G), x.column_G("consistency")
        loss_G = -c_G * logsigmoid(margin_G) - (1 - c_G) * logsigmoid(-margin_G)
        return HeadOutput(loss_G, {"cream/consistency": c_G})

    def start(self, K: int) -> float:
        return math.log(2)
