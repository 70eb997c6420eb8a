"""NFT: likelihood of right answers under the policy, and of wrong ones under the negative policy that it implies.

Paper: Chen et al. 2025, Bridging Supervised Learning and Reinforcement Learning in Math Reasoning, arXiv:2505.18116.

    loss_t = -w log R_t  (right),    -n w log max_v((1 - q R_t) / (1 - q), e)  (wrong),    R_t = pi(y_t) / mu(y_t)
    max_v(x, e) has the value max(x, e) and the gradient of x

Symbols: q the share of the group's responses that are right; w = 1 - q with omega = linear, sqrt((1 - q) / q) with
    omega = sqrt, 1 with omega = none; n = neg_weight; e = epsilon; mu the policy that sampled. A response is right
    where its reward is above 0, so rewards of 0 and 1 or of -1 and 1 are taken alike, and others by their sign only.
    log R_t of wrong responses is kept within +-20.
Length: mean over the tokens of the step.
Bounded below: no; on wrong responses by n w log e, which the straight-through gradient does not stop at.
Pins the level: no.
Limits: groups that are all right or all wrong say nothing; they count in the average. pi == mu: omega = sqrt has the
    gradient of GRPO with the population's deviation, omega = linear that of rewards minus the group's mean. neg_weight
    = 0: weighted likelihood of right answers (rejection sampling). A small epsilon multiplies the gradient of tokens
    with q R_t near 1 by up to 1 / epsilon.
Departures: the authors' code adds up tokens and divides by 1000, bounds q to 0.02 to 0.98 and log R_t by 10 from above,
    and falls back to DAPO's loss for a negative neg_weight; it can also take the ratio of whole responses. One summary
    of the paper has w = (1 - q) / q where the code has its square root, as here.
Unverified: the paper was not read; the formula is that of the authors' code, as are the defaults epsilon = 1 and omega.
Verified: closed form; vectors of an independent script; the two equivalences above.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from po.numeric import importance_ratio, masked_mean
from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class NFT(Head):
    needs: ClassVar[Needs] = Needs(
        layout="set", unit="token", reward=True, behaviour=True, correction=True, stops_gradient=True
    )

    epsilon: Annotated[float, Gt(0)] = 1.0
    omega: Literal["linear", "sqrt", "none"] = "linear"
    neg_weight: Annotated[float, Ge(0)] = 1.0

    def __call__(self, x: HeadInput) -> HeadOutput:
        right_GK = torch.where(x.seg.valid_GK, x.reward_GK, 0) > 0
        rate_G = masked_mean(right_GK.to(x.policy_T.dtype), x.seg.valid_GK)
        mixed_G = (rate_G > 0) & (rate_G < 1)
        weight_G = mixed_G * self._omega(torch.where(mixed_G, rate_G, 0.5))
        rate_T = x.seg.spread(torch.where(mixed_G, rate_G, 0.5)[:, None].expand_as(right_GK))
        right_T = x.seg.spread(right_GK)
        ratio_T = importance_ratio(x.policy_T, x.old_T)
        rest_T = (1 - rate_T * ratio_T) / (1 - rate_T)
        bounded_T = rest_T.detach().clamp(min=self.epsilon)
        wrong_T = bounded_T.log() + (rest_T - rest_T.detach()) / bounded_T  # straight through the bound
        said_T = torch.where(right_T, x.policy_T - x.old_T, self.neg_weight * wrong_T)
        weight_T = x.seg.spread(weight_G[:, None].expand_as(right_GK))
        clamped_T = (~right_T & (rest_T < self.epsilon)).to(ratio_T.dtype)
        metrics = {"nft/right": rate_G, "nft/ratio": ratio_T.detach(), "nft/clamped": clamped_T}
        return HeadOutput(-weight_T * said_T * x.correction_T, metrics)

    def start(self, K: int) -> float | None:
        return 0.0 if self.epsilon <= 1 or self.neg_weight == 0 else None

    def _omega(self, rate_G: Tensor) -> Tensor:
        match self.omega:
            case "linear":
                return 1 - rate_G
            case "sqrt":
                return ((1 - rate_G) / rate_G).sqrt()
            case "none":
                return torch.ones_like(rate_G)
