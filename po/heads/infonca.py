"""InfoNCA: K-way classification of the responses with the rewards as soft labels.

Paper: Chen et al. 2024, Noise Contrastive Alignment of Language Models with Explicit Rewards, arXiv:2402.05369.

    loss = - sum_k p_k log softmax(r)_k,    p = softmax(a R),    r_k = b log pi/ref(y_k)

Symbols: b = beta; a = alpha, larger is sharper (a -> inf leaves only the best response; ties share); R the rewards.
Length: sum.
Bounded below: yes, by the entropy of p (metric infonca/label_entropy); the loss minus it is infonca/kl.
Pins the level: no; the gradients of a group add up to 0.
Limits: K = 2 and a -> inf is DPO; K = 2 with p = (1 - e, e) is cDPO; at the optimum log pi/ref = (a/b) R + const.
    A group of one response has loss and gradient 0.
Departures: none known. The authors' config field temperature_alpha is 1/alpha, and their 1e-4 is one-hot in
    fact; their code has K = 4 and adds 0.01 to the first reward. We take any K, ragged, and touch no reward. TRL and
    HALOs have no such loss.
Verified: closed form; vectors on which the authors' executed code agrees; identities with DPO, cDPO and MPO.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Gt
from torch.special import entr

from po.numeric import masked_log_softmax, masked_softmax
from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class InfoNCA(Head):
    needs: ClassVar[Needs] = Needs(layout="set", reference=True, reward=True)

    beta: Annotated[float, Gt(0)] = 0.01
    alpha: Annotated[float, Gt(0)] = 1.0

    def __call__(self, x: HeadInput) -> HeadOutput:
        valid_GK = x.seg.valid_GK
        target_GK = masked_softmax(x.reward_GK, valid_GK, self.alpha)
        loss_G = -(target_GK * masked_log_softmax(self.beta * x.logratio_GK, valid_GK)).sum(-1)
        entropy_G = entr(target_GK).sum(-1)
        return HeadOutput(loss_G, {"infonca/label_entropy": entropy_G, "infonca/kl": loss_G.detach() - entropy_G})

    def start(self, K: int) -> float:
        return math.log(K)
