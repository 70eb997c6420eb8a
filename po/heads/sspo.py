"""Semi-Supervised Preference Optimization: a few pairs teach a reward threshold, which labels responses without labels.

Paper: Lee et al. 2025, Semi-Supervised Preference Optimization with Limited Feedback, arXiv:2511.00040.

    loss = g mean_pairs -log s(r_w - r_l) + (1 - g) mean_unlabelled -log s(|r_u - d|),    r(y) = (b/|y|) log pi(y)
    d = argmin P F_w(d) + (1 - P) (1 - F_l(d)), a moving average;    g = max(n_pairs / n_all, gamma_0 exp(-lam step))

Symbols: s = sigmoid; b = beta; |y| tokens; pairs are prompts with a desirable and an undesirable response (of
    several, the mean of r), unlabelled are prompts with unlabelled responses (each its own loss, then their mean);
    F_w, F_l the distributions of the step's r_w and r_l, smoothed by a normal kernel of width bandwidth (in units of
    r); P = prior; d the threshold, a constant, searched at 1024 points between min r_l and max r_w; ema: the share of
    the past in d; threshold: "kde" is this, "min" has d = min r_w; weigh_prior: unlabelled losses above d times P,
    below d times 1 - P; n_pairs, n_all count prompts since the first step, step starts at 1; gamma_0, lam: start and
    decay of g.
Length: mean.
Bounded below: yes, by 0.
Pins the level: yes, for unlabelled responses, which move away from d.
Limits: no reference, and no margin between r_w and r_l. Every prompt carries the loss of its side times the step's
    prompts per prompt of that side, so that the mean over prompts is the loss above; a side that is absent drops out.
    Until a pair has been seen there is no threshold and no loss.
Departures: the authors' trainer takes d = min r_w of a micro-batch ("min", and lets its gradient through), weighs by
    the prior (weigh_prior), standardises r for the second term by running statistics that it renews three times a
    step, and has SimPO's margin in the first; the last two are left out.
Unverified: bandwidth, ema, the kernel's distributions and the form of the unlabelled loss come from a public note about
    the paper; gamma_0, lam and the decay agree with the authors' trainer.
Verified: closed form, with both thresholds and over two steps; vectors of independent scripts, of which those of the
    unlabelled loss with weigh_prior follow the authors' code as read. No public code was executed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.special import ndtr

from po.numeric import masked_mean
from po.types import Head, HeadInput, HeadOutput, Needs

POINTS = 1024  # of the search for the threshold


@dataclass(frozen=True)
class SSPO(Head):
    needs: ClassVar[Needs] = Needs(layout="labelled", label=True, couples_batch=True, stops_gradient=True)

    beta: Annotated[float, Gt(0)] = 10.0
    gamma_0: Annotated[float, Ge(0), Le(1)] = 1.0
    lam: Annotated[float, Ge(0)] = 0.001
    bandwidth: Annotated[float, Gt(0)] = 1.0
    ema: Annotated[float, Ge(0), Lt(1)] = 0.9
    prior: Annotated[float, Gt(0), Lt(1)] = 0.5
    threshold: Literal["kde", "min"] = "kde"
    weigh_prior: bool = False

    def __call__(self, x: HeadInput) -> HeadOutput:
        r_GK = self.beta * x.seg.mean(x.policy_T)
        win_GK, lose_GK, other_GK = (x.seg.valid_GK & (x.label_GK == side) for side in (1, -1, 0))
        pair_G, open_G = win_GK.any(-1) & lose_GK.any(-1), other_GK.any(-1)
        state = self.follow(x.state, r_GK.detach(), win_GK & pair_G[:, None], lose_GK & pair_G[:, None], open_G)
        delta, pairs = state["delta"], state["pairs"]
        floor = pairs / (pairs + state["unlabelled"]).clamp(min=1)
        gamma = torch.maximum(floor, self.gamma_0 * (-self.lam * state["step"]).exp()).to(r_GK.dtype)

        paired_G = -logsigmoid(masked_mean(r_GK, win_GK) - masked_mean(r_GK, lose_GK))
        above_GK = r_GK > delta
        weight_GK = torch.where(above_GK, self.prior, 1 - self.prior) if self.weigh_prior else torch.ones_like(r_GK)
        gap_GK = torch.where(above_GK, r_GK - delta, delta - r_GK)
        open_loss_G = masked_mean(-weight_GK * logsigmoid(gap_GK), other_GK)
        rows = x.seg.valid_GK.any(-1).sum()
        first = gamma * rows / pair_G.sum().clamp(min=1) * pair_G
        second = (1 - gamma) * (pairs > 0) * rows / open_G.sum().clamp(min=1) * open_G
        metrics = {
            "sspo/delta": delta.expand_as(pair_G),
            "sspo/gamma": gamma.expand_as(pair_G),
            "sspo/above": masked_mean(above_GK.to(r_GK.dtype), other_GK),
        }
        return HeadOutput(first * paired_G + second * open_loss_G, metrics, state)

    def follow(
        self, old: Mapping[str, Tensor], r_GK: Tensor, win_GK: Tensor, lose_GK: Tensor, open_G: Tensor
    ) -> dict[str, Tensor]:
        """The state after a step."""
        found = win_GK.any()
        lowest_win = torch.where(win_GK, r_GK, torch.inf).min()
        new = lowest_win if self.threshold == "min" else self.least_risk(r_GK, win_GK, lose_GK)
        moved = torch.where(old["pairs"] > 0, self.ema * old["delta"] + (1 - self.ema) * new, new)
        return {
            "delta": torch.where(found, moved, old["delta"]),
            "step": old["step"] + 1,
            "pairs": old["pairs"] + win_GK.any(-1).sum(),
            "unlabelled": old["unlabelled"] + open_G.sum(),
        }

    def least_risk(self, r_GK: Tensor, win_GK: Tensor, lose_GK: Tensor) -> Tensor:
        """The threshold that mistakes the fewest responses, under smoothed distributions; NaN without pairs. ()"""
        r_M, win_M, lose_M = r_GK.flatten().double(), win_GK.flatten(), lose_GK.flatten()  # single would blur the least
        low, high = torch.where(lose_M, r_M, torch.inf).min(), torch.where(win_M, r_M, -torch.inf).max()
        at_N = low + (high - low) * torch.linspace(0, 1, POINTS, dtype=r_M.dtype, device=r_M.device)
        z_NM = (at_N[:, None] - r_M) / self.bandwidth
        risk_N = self.prior * masked_mean(ndtr(z_NM), win_M) + (1 - self.prior) * masked_mean(ndtr(-z_NM), lose_M)
        return at_N.gather(0, risk_N.argmin(0, keepdim=True))[0].to(r_GK.dtype)

    def state(self, rows: int) -> dict[str, Tensor]:
        return {name: torch.zeros(()) for name in ("delta", "step", "pairs", "unlabelled")}
