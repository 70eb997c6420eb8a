"""TDPO1: DPO whose margin also compares how far the policy has left the reference along the two responses.

Paper: Zeng et al. 2024, Token-level Direct Preference Optimization, arXiv:2404.11999.

    loss = -log s(b [h - (D(y_l) - D(y_w))]),    D(y) = sum_t KL_t
    h = log pi/ref(y_w) - log pi/ref(y_l),       KL_t = sum_v ref(v) (log ref(v) - log pi(v)) at position t

Symbols: s = sigmoid; b = beta, the strength of the KL constraint; v runs over the whole vocabulary; y_w the better
    response, y_l the worse.
Length: sum, of log-ratios and of KL_t.
Bounded below: yes, by 0.
Pins the level: no, but the KL terms draw both responses' distributions: the chosen one's from the reference, the
    rejected one's to it.
Limits: D = 0 is DPO; TDPO2 at alpha = 1 has the same value and, without its stop-gradient, is this. The KL has no
    gradient at policy == reference, so the first step is DPO's.
Departures: none known. The authors' config file trains TDPO1 where their README says TDPO2, and their reference
    log-probs are log(softmax), infinite on saturated logits; here both are log-softmax. They log rewards
    b (log pi/ref + D); the D is `tdpo1/seq_kl` here. TRL and HALOs have no TDPO.
Verified: closed form; a vector, with gradients for the logits, on which the authors' executed code agrees; identities
    with DPO, TDPO2 and SparsePO.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Gt
from torch.nn.functional import logsigmoid

from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class TDPO1(Head):
    needs: ClassVar[Needs] = Needs(layout="pair", reference=True, token_kl=True)

    beta: Annotated[float, Gt(0)] = 0.1

    def __call__(self, x: HeadInput) -> HeadOutput:
        chosen_G, rejected_G = x.logratio_GK.unbind(-1)
        kl_GK = x.seg.sum(x.token_kl_T)
        margin_G = chosen_G - rejected_G - (kl_GK[:, 1] - kl_GK[:, 0])
        return HeadOutput(-logsigmoid(self.beta * margin_G), {"tdpo1/seq_kl": kl_GK.detach()})

    def start(self, K: int) -> float:
        return math.log(2)
