"""NCA: each response against noise on its own, so that the likelihood of good responses is kept from falling.

Paper: Chen et al. 2024, Noise Contrastive Alignment of Language Models with Explicit Rewards, arXiv:2402.05369.

    loss = - sum_k p_k log s(r_k) - (1/K) sum_k log s(-r_k),    p = softmax(a R),    r_k = b log pi/ref(y_k)

Symbols: s = sigmoid; b = beta; a = alpha, larger is sharper (a -> inf leaves only the best response; ties share); R the
    rewards; K the responses of this group, not of the batch.
Length: sum.
Bounded below: yes, by 0.
Pins the level: yes; at the optimum r_k = log(K p_k).
Limits: K = 2 and a -> inf is TRL's nca_pair. A group of one response has p = 1: it is held at r = 0.
Departures: none known. The authors' config field temperature_alpha is 1/alpha, and their 1e-4 is one-hot in
    fact; their code has K = 4 and adds 0.01 to the first reward. We take any K, ragged, and touch no reward. TRL has
    only the pair with a one-hot label (`nca_pair`), HALOs none.
Verified: closed form; vectors on which the authors' executed code agrees, and TRL 1.16 for `nca_pair`.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Gt
from torch.nn.functional import logsigmoid
from torch.special import entr

from po.numeric import masked_mean, masked_softmax
from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class NCA(Head):
    needs: ClassVar[Needs] = Needs(layout="set", reference=True, reward=True)

    beta: Annotated[float, Gt(0)] = 0.01
    alpha: Annotated[float, Gt(0)] = 1.0

    def __call__(self, x: HeadInput) -> HeadOutput:
        valid_GK = x.seg.valid_GK
        target_GK = masked_softmax(x.reward_GK, valid_GK, self.alpha)
        r_GK = self.beta * x.logratio_GK
        loss_G = -(target_GK * logsigmoid(r_GK)).sum(-1) - masked_mean(logsigmoid(-r_GK), valid_GK)
        level_G = masked_mean(r_GK.detach(), valid_GK)
        return HeadOutput(loss_G, {"nca/label_entropy": entr(target_GK).sum(-1), "nca/level": level_G})

    def start(self, K: int) -> float:
        return 2 * math.log(2)
