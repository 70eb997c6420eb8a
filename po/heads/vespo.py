"""VESPO: REINFORCE with a smooth weight of the whole response's ratio.

Paper: Shen et al. 2026, VESPO: Variational Sequence-Level Soft Policy Optimization for Stable Off-Policy LLM Training,
    arXiv:2602.10693.

    loss_t = -sg(phi(w)) A log pi(y_t),    phi(w) = w^k exp(lambda (1 - w)),    w = pi(y) / mu(y)

Symbols: w of the whole response, its log kept within +-20; phi(1) = 1, and phi falls to 0 on both sides; k and lambda =
    k_pos and lambda_pos where A >= 0, k_neg and lambda_neg elsewhere; sg: no gradient; mu the policy that sampled; A =
    (r - mean r) / (std r + eps) over the responses of the prompt; scale: std divides by n (population), by n - 1
    (unbiased), or A is r - mean r (none).
Length: sum in w, which is not normalised; the loss is a mean over the tokens of the step.
Bounded below: no, but phi ends it once w has moved away from 1.
Pins the level: no.
Limits: pi == mu: REINFORCE with group advantages. Long responses drift out of reach sooner, since their log-ratios add
    up.
Departures: corrections of the sampler's imprecision multiply each token's term; in TRL 1.16 they enter w. eps is
    1e-4 there.
Unverified: the paper was not read; formula and constants are those of TRL 1.16, which names it.
Verified: closed form; a vector on which the executed code of TRL 1.16 agrees.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt

from po.numeric import group_advantages
from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class VESPO(Head):
    needs: ClassVar[Needs] = Needs(
        layout="set", unit="token", reward=True, behaviour=True, correction=True, stops_gradient=True
    )

    k_pos: Annotated[float, Gt(0)] = 2.0
    lambda_pos: Annotated[float, Gt(0)] = 3.0
    k_neg: Annotated[float, Gt(0)] = 3.0
    lambda_neg: Annotated[float, Gt(0)] = 2.0
    scale: Literal["population", "unbiased", "none"] = "unbiased"
    eps: Annotated[float, Ge(0)] = 0.0

    def __call__(self, x: HeadInput) -> HeadOutput:
        advantage_GK = group_advantages(x.reward_GK, x.seg.valid_GK, self.scale, self.eps)
        log_w_GK = x.seg.sum(x.policy_T.detach() - x.old_T).clamp(-20, 20)
        good_GK = advantage_GK >= 0
        k_GK = torch.where(good_GK, torch.full_like(log_w_GK, self.k_pos), self.k_neg)
        lambda_GK = torch.where(good_GK, torch.full_like(log_w_GK, self.lambda_pos), self.lambda_neg)
        phi_GK = (k_GK * log_w_GK - lambda_GK * log_w_GK.expm1()).exp()
        loss_T = -x.seg.spread(phi_GK * advantage_GK) * x.policy_T * x.correction_T
        zero_G = (advantage_GK == 0).all(-1).to(loss_T.dtype)
        return HeadOutput(loss_T, {"vespo/phi": phi_GK, "vespo/zero_std": zero_G})
