"""EXO on pairs: the reverse KL from the policy's softmax over the two responses to the smoothed labels.

Paper: Ji et al. 2024, Towards Efficient Exact Optimization of Language Model Alignment, arXiv:2402.00856 (EXO-pref).

    loss = sum_k q_k (log q_k - log p_k),    q = softmax(b log pi/ref(y_k)),    p = (1 - e, e)

Symbols: b = beta_pi, the policy's temperature (TRL: beta); e = epsilon, the label of the worse response; labels:
    smoothed is p above, official is the log-labels (0, -10) of the authors' code, which do not add up to 1 and read no
    epsilon. The better response is the first. The metric exo_pref/q is the policy's q of it.
Length: sum.
Bounded below: yes, by 0; with the official labels by -log(1 + e^-10).
Pins the level: no.
Limits: least at b h = log((1 - e) / e), with official labels at b h = 10, h the difference of the two log-ratios. DPO
    is the forward KL with e = 0; there is no e = 0 here, log 0 is infinite. The gradient fades where the policy is sure
    of either response, the worse one too.
Departures: as TRL 1.16 `exo_pair`, which clamps nothing at e = 0 and returns infinity. The authors' code is labels:
    official with beta_pi 0.5: p shifted by log(1 + e^-10), a constant, with e = 1 / (1 + e^10). HALOs has none.
Verified: closed form; vectors on which the executed code of TRL 1.16 (smoothed) and of the authors (official) agrees.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Gt, Lt

from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class EXOPref(Head):
    needs: ClassVar[Needs] = Needs(layout="pair", reference=True)

    beta_pi: Annotated[float, Gt(0)] = 0.1
    epsilon: Annotated[float, Gt(0), Lt(0.5)] = 0.001
    labels: Literal["smoothed", "official"] = "smoothed"

    @property
    def beta(self) -> float:
        """The scale of the implicit reward."""
        return self.beta_pi

    @property
    def log_p(self) -> tuple[float, float]:
        """The log-labels of the better and the worse response."""
        return (0.0, -10.0) if self.labels == "official" else (math.log1p(-self.epsilon), math.log(self.epsilon))

    def __call__(self, x: HeadInput) -> HeadOutput:
        better_G, worse_G = (self.beta_pi * x.logratio_GK).log_softmax(-1).unbind(-1)
        log_p_better, log_p_worse = self.log_p
        loss_G = better_G.exp() * (better_G - log_p_better) + worse_G.exp() * (worse_G - log_p_worse)
        return HeadOutput(loss_G, {"exo_pref/q": better_G.detach().exp()})

    def start(self, K: int) -> float:
        return -math.log(2) - sum(self.log_p) / 2
