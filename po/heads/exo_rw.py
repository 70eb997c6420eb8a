"""EXO on scored responses: the reverse KL from the policy's softmax over a set to the softmax of the rewards.

Paper: Ji et al. 2024, Towards Efficient Exact Optimization of Language Model Alignment, arXiv:2402.00856 (EXO-rw).

    loss = sum_k q_k (log q_k - log p_k),    q = softmax(b log pi/ref(y_k)),    p = softmax(R / c)

Symbols: b = beta_pi, the policy's temperature; c = beta_r, that of the rewards (smaller is sharper); R the rewards; k
    runs over the responses of this group. The metric exo_rw/label_entropy is the entropy of p.
Length: sum.
Bounded below: yes, by 0.
Pins the level: no.
Limits: least, 0, at log pi/ref = R / (b c) + a constant, where InfoNCA with alpha = 1 / c has its minimum too: InfoNCA
    is the forward KL plus the entropy of p. A group of one response, and equal rewards at policy == reference, give 0.
Departures: none known from the authors' code, which has groups of one fixed size; ragged groups count alike here. TRL
    and HALOs have none.
Verified: closed form, also of a set; the authors' code was read, not executed; identities with EXO-pref and InfoNCA.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Gt
from torch.special import entr

from po.numeric import masked_log_softmax
from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class EXORw(Head):
    needs: ClassVar[Needs] = Needs(layout="set", reference=True, reward=True)

    beta_pi: Annotated[float, Gt(0)] = 0.5
    beta_r: Annotated[float, Gt(0)] = 0.5

    @property
    def beta(self) -> float:
        """The scale of the implicit reward."""
        return self.beta_pi

    def __call__(self, x: HeadInput) -> HeadOutput:
        valid_GK = x.seg.valid_GK
        log_q_GK = masked_log_softmax(self.beta_pi * x.logratio_GK, valid_GK)
        log_p_GK = masked_log_softmax(x.reward_GK / self.beta_r, valid_GK)
        entropy_G = entr(log_p_GK.exp() * valid_GK).sum(-1)
        return HeadOutput((log_q_GK.exp() * (log_q_GK - log_p_GK)).sum(-1), {"exo_rw/label_entropy": entropy_G})
