"""DRO-V: regress the scaled log-ratio and a learned value of the prompt onto the response's reward.

Paper: Richemond et al. 2024, Offline Regularised Reinforcement Learning for Large Language Models Alignment,
    arXiv:2405.19107.

    loss = 1/2 (R - V(x) - t u)^2,    u = log pi/ref(y)

Symbols: t = tau, the strength of the KL regularisation; R the reward of one response; V a linear layer on the policy's
    last hidden state before the first response token, trained along with the policy and starting at 0.
Length: sum.
Bounded below: yes, by 0.
Pins the level: yes; for a fitted V the optimum is u = (R - V) / t.
Limits: standardise the rewards, since V starts at 0 and has to learn their mean. Takes the responses of a set one at a
    time: a row may have one alone, and a set of equal rewards teaches V alone.
Departures: V reads the policy's hidden states instead of being a network of its own, and its gradient stops there, so
    that it does not train the policy. Its learning rate is the policy's.
Unverified: the formula is that of secondary sources. There the policy's update is also divided by tau, and the value
    has a learning rate of its own; where the paper divides is not known.
Verified: closed form with respect to policy and value (no public code was executed); the optimum has no gradient.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Gt
from torch import nn

from po.numeric import Value
from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class DROV(Head):
    needs: ClassVar[Needs] = Needs(
        layout="set", unit="response", single=True, reference=True, reward=True, hidden="policy"
    )

    tau: Annotated[float, Gt(0)] = 1.0

    @property
    def beta(self) -> float:
        """The scale of the implicit reward."""
        return self.tau

    def __call__(self, x: HeadInput) -> HeadOutput:
        slot_T = x.seg.slot_T
        first_T = torch.cat([torch.ones_like(slot_T[:1], dtype=torch.bool), slot_T[1:] != slot_T[:-1]])
        value_GK = x.seg.sum(torch.where(first_T, x.gate_T("value"), 0))
        reward_GK = torch.where(x.seg.valid_GK, x.reward_GK, 0)
        residual_GK = reward_GK - value_GK - self.tau * x.logratio_GK
        metrics = {"dro_v/value": value_GK.detach(), "dro_v/residual": residual_GK.detach().abs()}
        return HeadOutput(residual_GK**2 / 2, metrics)

    def build(self, hidden_size: int, layers: int) -> nn.Module:
        return Value(hidden_size)
