"""TDPO2: DPO with a KL term that holds the rejected response to the level of drift that the chosen one has.

Paper: Zeng et al. 2024, Token-level Direct Preference Optimization, arXiv:2404.11999.

    loss = -log s(b [h - a (D(y_l) - sg D(y_w))]),    D(y) = sum_t KL_t
    h = log pi/ref(y_w) - log pi/ref(y_l),            KL_t = sum_v ref(v) (log ref(v) - log pi(v)) at position t

Symbols: s = sigmoid; sg: a constant in the gradient; b = beta, the strength of the KL constraint; a = alpha, the weight
    of the KL difference; v runs over the whole vocabulary; y_w the better response, y_l the worse.
Length: sum, of log-ratios and of KL_t.
Bounded below: yes, by 0.
Pins the level: no, but the rejected response's distributions are drawn to the reference's.
Limits: D = 0 is DPO; alpha = 1 has TDPO1's value, not its gradient. The KL has no gradient at policy == reference, so
    the first step is DPO's.
Departures: none known. In the authors' code the flag that chooses TDPO2 is off in the config file, so their README's
    command trains TDPO1, and their reference log-probs are log(softmax), infinite on saturated logits; here
    both are log-softmax. They log rewards b (log pi/ref + D); the D is `tdpo2/seq_kl` here. TRL and HALOs have no TDPO.
Verified: closed form; a vector, with gradients for the logits, on which the authors' executed code agrees; identities
    with DPO and TDPO1.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Gt
from torch.nn.functional import logsigmoid

from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class TDPO2(Head):
    needs: ClassVar[Needs] = Needs(layout="pair", reference=True, token_kl=True, stops_gradient=True)

    beta: Annotated[float, Gt(0)] = 0.1
    alpha: Annotated[float, Gt(0)] = 0.5

    def __call__(self, x: HeadInput) -> HeadOutput:
        chosen_G, rejected_G = x.logratio_GK.unbind(-1)
        kl_GK = x.seg.sum(x.token_kl_T)
        margin_G = chosen_G - rejected_G - self.alpha * (kl_GK[:, 1] - kl_GK[:, 0].detach())
        return HeadOutput(-logsigmoid(self.beta * margin_G), {"tdpo2/seq_kl": kl_GK.detach()})

    def start(self, K: int) -> float:
        return math.log(2)
