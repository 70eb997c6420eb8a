"""AlphaPO: SimPO with a reward that bends: alpha decides how it grows with the likelihood.

Paper: Gupta et al. 2025, AlphaPO: Reward Shape Matters for LLM Alignment, arXiv:2501.03884.

    loss = -log s(b (r(y_w) - r(y_l)) - g),    r(y) = (1 - p(y)^-a) / a,    log p(y) = (1/|y|) sum_i log pi(y_i)

Symbols: s = sigmoid; b = beta; g = gamma, the target margin; a = alpha, the reward's shape, and r = log p at 0; |y| the
    response's tokens, EOS included; y_w the better response, y_l the worse.
Length: mean.
Bounded below: yes, by 0.
Pins the level: partly; with a > 0 unlikely responses count more than likely ones, but no level is the optimum.
Limits: alpha = 0 is SimPO. p^-a is exp(-a log p); its exponent counts as 30 at most (for a = 0.25 a mean of -120 nats a
    token), where the gradient ends.
Departures: computed as -expm1(-a log p) / a. TRL 1.16 (CPOTrainer, `alphapo`) exponentiates and then raises to -a.
Unverified: the default alpha = 0.25 and the range of alpha; the paper's text was not at hand.
Verified: closed form; TRL 1.16's executed code agrees on the same pairs.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Lt
from torch.nn.functional import logsigmoid

from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class AlphaPO(Head):
    needs: ClassVar[Needs] = Needs(layout="pair")

    beta: Annotated[float, Gt(0)] = 2.5
    gamma: Annotated[float, Ge(0)] = 0.25
    alpha: Annotated[float, Gt(-10), Lt(10)] = 0.25

    def __call__(self, x: HeadInput) -> HeadOutput:
        a, mean_GK = self.alpha, x.seg.mean(x.policy_T)
        reward_GK = torch.expm1((-a * mean_GK).clamp(max=30)) / -a if a else mean_GK
        chosen_G, rejected_G = reward_GK.unbind(-1)
        margin_G = self.beta * (chosen_G - rejected_G) - self.gamma
        return HeadOutput(-logsigmoid(margin_G), {"alphapo/margin": margin_G.detach()})
