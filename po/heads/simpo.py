"""Simple Preference Optimization: mean log-probs as rewards, a target margin, no reference.

Paper: Meng et al. 2024, SimPO: Simple Preference Optimization with a Reference-Free Reward, arXiv:2405.14734.

    loss = -log s(b (m(y_w) - m(y_l)) - g),    m(y) = (1/|y|) sum_i log pi(y_i)

Symbols: s = sigmoid; b = beta, per token and so 2 to 10; g = gamma, the target margin, 0.1 to 0.8 of beta; |y| the
    response's tokens, EOS included; y_w the better response, y_l the worse.
Length: mean.
Bounded below: yes, by 0.
Pins the level: no.
Limits: nothing holds the policy where it started but a small learning rate (3e-7 to 1e-6).
Departures: none known. The authors' config and HALOs hold gamma / beta instead of gamma; TRL 1.16 has it in CPOTrainer
    (simpo_gamma), which adds the better response's likelihood unless cpo_alpha is 0.
Verified: closed form; a vector on which the executed code of the authors, HALOs and TRL 1.16 agrees.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge, Gt
from torch.nn.functional import logsigmoid

from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class SimPO(Head):
    needs: ClassVar[Needs] = Needs(layout="pair")

    beta: Annotated[float, Gt(0)] = 2.0
    gamma: Annotated[float, Ge(0)] = 0.5

    def __call__(self, x: HeadInput) -> HeadOutput:
        chosen_G, rejected_G = x.seg.mean(x.policy_T).unbind(-1)
        margin_G = self.beta * (chosen_G - rejected_G) - self.gamma
        return HeadOutput(-logsigmoid(margin_G), {"simpo/margin": margin_G.detach()})
