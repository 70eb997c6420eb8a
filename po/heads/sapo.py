"""SAPO: GRPO with a sigmoid of the token's ratio in place of the clip.

Paper: Gao et al. 2025, Soft Adaptive Policy Optimization, arXiv:2511.20347.

    loss = mean_t -(4 / tau) sigma(tau (rho_t - 1)) A,    rho_t = pi(y_t) / mu(y_t)

Symbols: tau = tau_pos where A > 0 and tau_neg elsewhere: how fast the gradient fades away from a ratio of 1; mu the
    policy that sampled; A = (r - mean r) / (std r + eps) over the responses of the prompt; scale: std divides by n
    (population), by n - 1 (unbiased), or A is r - mean r (none).
Length: mean over tokens.
Bounded below: yes, by -4 |A| / tau.
Pins the level: no, but a token's gradient dies as its ratio leaves 1.
Limits: at pi == mu the gradient is GRPO's, while the value is -2 A / tau: losses of the two cannot be compared. A group
    of equal rewards has no gradient; it counts in the average.
Departures: no KL term (TRL's `beta`): add a head for it. eps is 1e-4 in TRL 1.16 and 1e-6 in verl.
Unverified: the paper was not read; the gate and both temperatures are those of TRL 1.16, which names it.
Verified: closed form; vectors on which the executed code of TRL 1.16 and verl agrees.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt

from po.numeric import group_advantages, importance_ratio
from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class SAPO(Head):
    needs: ClassVar[Needs] = Needs(layout="set", unit="response", reward=True, behaviour=True, correction=True)

    tau_pos: Annotated[float, Gt(0)] = 1.0
    tau_neg: Annotated[float, Gt(0)] = 1.05
    scale: Literal["population", "unbiased", "none"] = "unbiased"
    eps: Annotated[float, Ge(0)] = 0.0

    def __call__(self, x: HeadInput) -> HeadOutput:
        advantage_GK = group_advantages(x.reward_GK, x.seg.valid_GK, self.scale, self.eps)
        advantage_T = x.seg.spread(advantage_GK)
        ratio_T = importance_ratio(x.policy_T, x.old_T)
        tau_T = torch.where(advantage_T > 0, torch.full_like(ratio_T, self.tau_pos), self.tau_neg)
        gate_T = 4 / tau_T * (tau_T * (ratio_T - 1)).sigmoid()
        loss_T = -gate_T * advantage_T * x.correction_T
        zero_G = (advantage_GK == 0).all(-1).to(ratio_T.dtype)
        return HeadOutput(x.seg.mean(loss_T), {"sapo/ratio": ratio_T.detach(), "sapo/zero_std": zero_G})
