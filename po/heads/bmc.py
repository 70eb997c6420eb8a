"""BMC-DPO: DPO that counts the tokens in which the two responses differ more, the less likely they were the more.

Paper: Jiang et al. 2024, Bridging and Modeling Correlations in Pairwise Data for Direct Preference Optimization,
    arXiv:2408.07471.

    loss = -log s(b [u(y_w) - u(y_l)]),    w_t(p) = 1 + [t is in the edit] min(1 / p(y_t), delta), a constant
    paper: u(y) = sum_t w_t(pi) (log pi(y_t) - log ref(y_t))
    code:  u(y) = sum_t (w_t(pi) log pi(y_t) - w_t(ref) log ref(y_t))

Symbols: s = sigmoid; b = beta; delta: the cap on 1/p, above 1; form: whose probability weights the reference's tokens;
    y_w the better response (made by editing the worse, y_l).
Length: sum, weighted.
Bounded below: yes, by 0.
Pins the level: no; only the difference of the two weighted sums counts.
Limits: no edit is DPO. Weights of edited tokens lie in [2, 1 + delta]. Both forms agree at policy == reference.
Departures: none known in form = "code", which is the released trainer's: it computes each model's weighted sum apart,
    so the reference is weighted by its own confidence and u is no log-ratio. The edit (difflib over token ids,
    without lone stop-words) is made from the data, not here. TRL and HALOs have no BMC.
Unverified: form = "paper" (policy weights on both models); of the paper only the abstract was at hand.
Verified: closed form, both forms; for each a vector with gradients for the logits and one for the log-probs. The
    authors' executed code agrees with form = "code"; form = "paper" has no public counterpart.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Gt
from torch import Tensor
from torch.nn.functional import logsigmoid

from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class BMC(Head):
    needs: ClassVar[Needs] = Needs(layout="pair", reference=True, differs=True, raw_logps=True, stops_gradient=True)

    beta: Annotated[float, Gt(0)] = 0.01
    delta: Annotated[float, Gt(1)] = 2.0
    form: Literal["paper", "code"] = "paper"

    def __call__(self, x: HeadInput) -> HeadOutput:
        weight_T = self._weight(x.policy_T, x.differs_T)
        ref_weight_T = weight_T if self.form == "paper" else self._weight(x.ref_T, x.differs_T)
        chosen_G, rejected_G = x.seg.sum(weight_T * x.policy_T - ref_weight_T * x.ref_T).unbind(-1)
        return HeadOutput(-logsigmoid(self.beta * (chosen_G - rejected_G)), {"bmc/weight": weight_T})

    def _weight(self, logp_T: Tensor, differs_T: Tensor) -> Tensor:
        """1, and on edited tokens more by 1/p, at most by delta."""
        return torch.where(differs_T, 1 + (-logp_T.detach()).exp().clamp(max=self.delta), 1)

    def start(self, K: int) -> float:
        return math.log(2)
