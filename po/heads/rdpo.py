"""Robust DPO (rDPO): an unbiased estimate of DPO's loss on clean labels, from labels of which a known share is flipped.

Paper: Chowdhury et al. 2024, Provably Robust DPO: Aligning Language Models with Noisy Feedback, arXiv:2403.00409.

    loss = [-(1 - e) log s(b h) + e log s(-b h)] / (1 - 2 e),    h = log pi/ref(y_w) - log pi/ref(y_l)

Symbols: s = sigmoid; b = beta; e = epsilon, the share of flipped labels (below 1/2); y_w the response labelled better,
    y_l the other one.
Length: sum.
Bounded below: no; for h -> inf the loss falls on with slope -b e / (1 - 2 e), unless e = 0.
Pins the level: no.
Limits: e = 0 is DPO. The mean over a label and its flip, with probabilities 1 - e and e, is DPO on the true label.
Departures: none known; as TRL 1.16 `robust`, which calls epsilon label_smoothing. cDPO (`dpo` with label_smoothing)
    adds the second term instead of taking it away, and is bounded. Length-regularised "R-DPO" is another method.
Verified: closed form; a vector on which the executed code of TRL 1.16 agrees; identities with DPO and cDPO.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge, Gt, Lt
from torch.nn.functional import logsigmoid

from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class RDPO(Head):
    needs: ClassVar[Needs] = Needs(layout="pair", reference=True)

    beta: Annotated[float, Gt(0)] = 0.1
    epsilon: Annotated[float, Ge(0), Lt(0.5)] = 0.1

    def __call__(self, x: HeadInput) -> HeadOutput:
        chosen_G, rejected_G = x.logratio_GK.unbind(-1)
        margin_G = self.beta * (chosen_G - rejected_G)
        e = self.epsilon
        return HeadOutput((-(1 - e) * logsigmoid(margin_G) + e * logsigmoid(-margin_G)) / (1 - 2 * e))

    def start(self, K: int) -> float:
        return math.log(2)
