"""Direct Preference Optimization; with label_smoothing, conservative DPO (cDPO).

Paper: Rafailov et al. 2023, Direct Preference Optimization: Your Language Model is Secretly a Reward Model,
    arXiv:2305.18290. cDPO: Mitchell 2023, ericmitchell.ai/cdpo.pdf.

    loss = -(1 - e) log s(b h) - e log s(-b h),    h = log pi/ref(y_w) - log pi/ref(y_l)

Symbols: s = sigmoid; b = beta, the strength of the KL constraint; e = label_smoothing, the assumed share of flipped
    labels (0 is the paper's DPO); y_w the better response, y_l the worse.
Length: sum.
Bounded below: yes; DPO by 0, cDPO by the entropy of (e, 1 - e).
Pins the level: no; only the difference of the two log-ratios counts, and both likelihoods may fall.
Limits: e = 0 is InfoNCA with K = 2 and alpha -> inf; cDPO is least at b h = log((1 - e) / e).
Departures: none known. TRL 1.16 `sigmoid` ignores label_smoothing and trains plain DPO; HALOs has a separate
    `cdpo`.
Verified: closed form; vectors on which the executed code of TRL 1.16, HALOs and eric-mitchell agrees; identities with
    InfoNCA and MPO.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge, Gt, Lt
from torch.nn.functional import logsigmoid

from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class DPO(Head):
    needs: ClassVar[Needs] = Needs(layout="pair", reference=True)

    beta: Annotated[float, Gt(0)] = 0.1
    label_smoothing: Annotated[float, Ge(0), Lt(0.5)] = 0.0

    def __call__(self, x: HeadInput) -> HeadOutput:
        chosen_G, rejected_G = x.logratio_GK.unbind(-1)
        margin_G = self.beta * (chosen_G - rejected_G)
        e = self.label_smoothing
        return HeadOutput(-(1 - e) * logsigmoid(margin_G) - e * logsigmoid(-margin_G))

    def start(self, K: int) -> float:
        return math.log(2)
