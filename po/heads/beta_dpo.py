"""beta-DPO: DPO whose beta follows the batch's mean margin, on pairs whose margin is not far from the usual.

Paper: Wu et al. 2024, beta-DPO: Direct Preference Optimization with Dynamic beta, arXiv:2407.08639.

    loss = -(n / k) log s(b' h) of the k pairs kept, 0 of the others,    b' = max(0.001, b (1 + a (mean_kept h - M))),
    h = log pi/ref(y_w) - log pi/ref(y_l),    k = floor((1 - rho) n) kept with chances ~ exp(-(h - M)^2 / (2 S^2))

Symbols: s = sigmoid; b = beta; a = alpha, how far beta follows the margin; rho, the share of the step's n pairs that is
    left out; M and S, running mean and standard deviation of h: each step keeps momentum of them (0 before the first
    step) and adds 1 - momentum of the step's own, before they are used; y_w the better response, y_l the worse.
Length: sum.
Bounded below: yes, by 0.
Pins the level: no.
Limits: rho = alpha = 0 is DPO. b' is a constant to the gradient. M and S start at 0, so in the first 20 steps or so M
    lags behind and beta moves more. S = 0 (all margins equal, policy == reference) gives all pairs the same chance. At
    least one pair is kept.
Departures: k is drawn without replacement by noise that is a hash of the row and the step (Gumbel top-k), so a resumed
    run draws the same. n / k makes the mean over all pairs that over the kept ones. At S = 0 the authors' code divides
    0 by 0. momentum is a constant there. TRL and HALOs have no such loss.
Verified: closed form for a given draw; a vector with rho = 0 on which the authors' executed code agrees; the frequency
    of draws.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor
from torch.nn.functional import logsigmoid

from po.numeric import hashed_uniform, masked_mean, masked_std
from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class BetaDPO(Head):
    needs: ClassVar[Needs] = Needs(layout="pair", reference=True, row=True, couples_batch=True, stops_gradient=True)

    beta: Annotated[float, Gt(0)] = 0.1
    alpha: Annotated[float, Ge(0)] = 0.6
    rho: Annotated[float, Ge(0), Lt(1)] = 0.2
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9

    def state(self, rows: int) -> dict[str, Tensor]:
        return {"mean": torch.zeros(()), "std": torch.zeros(()), "step": torch.zeros((), dtype=torch.int64)}

    def __call__(self, x: HeadInput) -> HeadOutput:
        chosen_G, rejected_G = x.logratio_GK.unbind(-1)
        h_G, valid_G = chosen_G - rejected_G, x.seg.valid_GK.all(-1)
        fixed_G, m = h_G.detach(), self.momentum
        mean = m * x.state["mean"] + (1 - m) * masked_mean(fixed_G, valid_G)
        std = m * x.state["std"] + (1 - m) * masked_std(fixed_G, valid_G)
        kept_G = self.keep(torch.where(std > 0, (fixed_G - mean) / std, 0), valid_G, x.row_G, x.state["step"])
        beta = (self.beta * (1 + self.alpha * (masked_mean(fixed_G, kept_G) - mean))).clamp(min=1e-3)
        share = valid_G.to(h_G.dtype).sum() / kept_G.sum().clamp(min=1)
        loss_G = torch.where(kept_G, -share * logsigmoid(beta * h_G), 0)
        metrics = {"beta_dpo/beta": beta.expand_as(h_G), "beta_dpo/kept": kept_G.to(h_G.dtype)}
        metrics |= {"beta_dpo/mean": mean.expand_as(h_G), "beta_dpo/std": std.expand_as(h_G)}
        return HeadOutput(loss_G, metrics, {"mean": mean, "std": std, "step": x.state["step"] + 1})

    def keep(self, z_G: Tensor, valid_G: Tensor, row_G: Tensor, step: Tensor) -> Tensor:
        """A draw without replacement: the largest log-weights after Gumbel noise."""
        noise_G = -(-hashed_uniform(row_G * 0x9E3779B1 + step * 0x3C6EF372).log()).log()
        rank_G = torch.where(valid_G, z_G**2 / 2 - noise_G, torch.inf).argsort(stable=True).argsort()
        count = ((1 - self.rho) * valid_G.sum().double() + 1e-6).floor().clamp(min=1)
        return (rank_G < count) & valid_G

    def start(self, K: int) -> float | None:
        return math.log(2) if self.rho == 0 else None
