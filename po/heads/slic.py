"""SLiC-HF: a hinge on the log-probs themselves, plus the better response's likelihood.

Paper: Zhao et al. 2023, SLiC-HF: Sequence Likelihood Calibration with Human Feedback, arXiv:2305.10425.

    loss = max(0, d - log pi(y_w) + log pi(y_l)) - l log pi(y_w)

Symbols: d = delta, the margin in nats; l = lam (the paper's lambda), the weight of the likelihood; y_w the better
    response, y_l the worse.
Length: sum, in both terms.
Bounded below: yes, by 0.
Pins the level: yes, upwards, by the second term.
Limits: the hinge is silent once the margin is delta; at the kink its gradient is 0.
Departures: y_w stands for the paper's fine-tuning target. HALOs' `slic` adds a matrix of token losses to the pairs'
    losses and fails. TRL's `hinge` is another loss: it has a reference.
Unverified: delta = 1 and lam = 0.1, which are HALOs'; the paper's text was not at hand.
Verified: closed form; a vector of an independent script. No public code of this loss runs.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge
from torch import Tensor

from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class SLiC(Head):
    needs: ClassVar[Needs] = Needs(layout="pair")

    delta: Annotated[float, Ge(0)] = 1.0
    lam: Annotated[float, Ge(0)] = 0.1

    def __call__(self, x: HeadInput) -> HeadOutput:
        chosen_G, rejected_G = x.seg.sum(x.policy_T).unbind(-1)
        hinge_G: Tensor = (self.delta - chosen_G + rejected_G).relu()
        return HeadOutput(hinge_G - self.lam * chosen_G, {"slic/inside": (hinge_G.detach() > 0).to(hinge_G.dtype)})
