"""PPO: clipped policy gradient on tokens with a learned value of each, the KL in the reward.

Paper: Schulman et al. 2017, Proximal Policy Optimization Algorithms, arXiv:1707.06347.

    loss_t = -min(rho_t A_t, clip(rho_t, 1 - el, 1 + eh) A_t) + vf L_t,    rho_t = pi(y_t) / mu(y_t)
    L_t = 1/2 max((V_t - R_t)^2, (V'_t - R_t)^2),    V'_t = U_t + clip(V_t - U_t, -ev, ev),    R_t = a_t + U_t
    a_t = sum_{s >= t} (g l)^{s - t} (r_s + g U_{s + 1} - U_s),    r_t = [t is last] r - b log mu(y_t)/ref(y_t)

Symbols: V_t a linear layer on the policy's last hidden state that predicts y_t, trained along with the policy and
    starting at 0; U_t what it said when y was sampled, 0 behind the last token; A_t = a_t, with whiten at mean 0 and
    variance 1 over all tokens of the step; r the response's reward; g = gamma; l = lam; b = beta; vf = vf_coef; ev =
    epsilon_value; el, eh = epsilon_low, epsilon_high; with dual_clip the policy's term is at most -c A_t where A_t < 0;
    mu the policy that sampled.
Length: the loss is a mean over the tokens of the step.
Bounded below: where A_t > 0, by -(1 + eh) A_t; where A_t < 0, by 0.
Pins the level: through the KL.
Limits: pi == mu: A2C with generalised advantages. lam = 1 and gamma = 1: a_t is the return less the value. Responses
    cut at the length limit count as ended. Takes responses one by one: one sample of a prompt is enough.
Departures: V reads the policy's hidden states instead of being a network of its own, and its gradient stops there, so
    that it does not train the policy; its learning rate is the policy's. The paper has no KL in the reward, no clip of
    the value and no whitening: these are common to TRL, verl and OpenRLHF, and so are the defaults (TRL's, of its
    experimental trainer). Whitening is over what one optimizer step reads, with divisor n - 1. c = 3 is verl's.
Unverified: the paper was not read; the formula is that of the named libraries.
Verified: closed form with respect to policy and value, dual clip included; advantages, returns, whitening, dual clip
    and value loss of an independent script, checked there against verl's executed code.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from po.numeric import Value, clip_ended, clipped_surrogate, importance_ratio, later_sums, whiten
from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class PPO(Head):
    needs: ClassVar[Needs] = Needs(
        layout="set",
        unit="token",
        single=True,
        reference=True,
        reward=True,
        behaviour=True,
        correction=True,
        hidden="policy",
        raw_logps=True,
        couples_batch=True,
    )

    beta: Annotated[float, Ge(0)] = 0.05
    epsilon_low: Annotated[float, Gt(0), Le(1)] = 0.2
    epsilon_high: Annotated[float, Gt(0)] = 0.2
    gamma: Annotated[float, Gt(0), Le(1)] = 1.0
    lam: Annotated[float, Ge(0), Le(1)] = 0.95
    whiten: bool = True
    vf_coef: Annotated[float, Ge(0)] = 0.1
    epsilon_value: Annotated[float, Gt(0)] = 0.2
    dual_clip: bool = False
    c: Annotated[float, Gt(1)] = 3.0

    def __call__(self, x: HeadInput) -> HeadOutput:
        value_T, old_value_T = x.gate_T("value"), x.old_gate_T("value")
        kl_T = x.old_T - x.ref_T
        gae_T = self._gae(x, kl_T, old_value_T)
        return_T = gae_T + old_value_T
        advantage_T = whiten(gae_T, x.seg.spread(x.seg.valid_GK), unbiased=True) if self.whiten else gae_T
        ratio_T = importance_ratio(x.policy_T, x.old_T)
        policy_T = clipped_surrogate(ratio_T, advantage_T, self.epsilon_low, self.epsilon_high)
        if self.dual_clip:
            policy_T = torch.where(advantage_T < 0, policy_T.minimum(-self.c * advantage_T), policy_T)
        near_T = old_value_T + (value_T - old_value_T).clamp(-self.epsilon_value, self.epsilon_value)
        miss_T = torch.maximum((value_T - return_T) ** 2, (near_T - return_T) ** 2) / 2
        low_T, high_T = clip_ended(ratio_T, advantage_T, self.epsilon_low, self.epsilon_high)
        metrics = {
            "ppo/kl": kl_T,
            "ppo/ratio": ratio_T.detach(),
            "ppo/clip_low": low_T,
            "ppo/clip_high": high_T,
            "ppo/return": return_T,
            "ppo/value": value_T.detach(),
            "ppo/value_loss": miss_T.detach(),
        }
        return HeadOutput(policy_T * x.correction_T + self.vf_coef * miss_T, metrics)

    def _gae(self, x: HeadInput, kl_T: Tensor, value_T: Tensor) -> Tensor:
        """Generalised advantages of the tokens."""
        slot_T = x.seg.slot_T
        last_T = torch.cat([slot_T[1:] != slot_T[:-1], torch.ones_like(slot_T[:1], dtype=torch.bool)])
        reward_T = torch.where(last_T, x.seg.spread(x.reward_GK), 0) - self.beta * kl_T
        next_T = torch.where(last_T, 0, value_T.roll(-1))
        return later_sums(reward_T + self.gamma * next_T - value_T, slot_T, self.gamma * self.lam)

    def build(self, hidden_size: int, layers: int) -> nn.Module:
        return Value(hidden_size)
