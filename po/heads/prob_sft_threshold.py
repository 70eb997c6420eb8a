"""Probability-based fine-tuning on some tokens only: those the model finds likely, or those it does not.

Paper: Li et al. 2025, Beyond Log Likelihood: Probability-Based Objectives for Supervised Fine-Tuning across the Model
    Capability Continuum, arXiv:2510.00526.

    loss_t = [t kept] (N / n) (1 - p_t^a) / a,    a = 0: -log p_t,    p_t = pi(y_t | x, y_<t)
    kept: p_t >= q (top), p_t <= q (bottom);    N the tokens of the best responses of the step, n the kept ones of them

Symbols: a = alpha: 1 is 1 - p, 0 the negative log-likelihood; q = threshold; keep: top or bottom. The factor N / n
    turns the mean over all tokens into the mean over the kept ones.
Length: mean over the kept tokens of the optimizer step.
Bounded below: yes, by 0.
Pins the level: yes; it raises the likelihood of the kept tokens.
Limits: top with q -> 0 is prob_sft. Which tokens are kept follows the policy, and is not differentiated. No token kept:
    loss and gradient 0. prob_sft_threshold/kept is the share of kept tokens.
Departures: as the authors' OnlyTopP-q and OnlyBottomP-q (alpha 1), OnlyTopLogP-q and OnlyBottomLogP-q (alpha 0), but
    n is counted over the whole step where their code counts per micro-batch, and is NaN where nothing is kept. TRL has
    none.
Verified: closed form; vectors of an independent script from the formulas of the authors' code, which was read and not
    run; identity with prob_sft.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Lt

from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class ProbSFTThreshold(Head):
    needs: ClassVar[Needs] = Needs(layout="best", unit="token", couples_batch=True)

    alpha: Annotated[float, Ge(0)] = 1.0
    threshold: Annotated[float, Gt(0), Lt(1)] = 0.1
    keep: Literal["top", "bottom"] = "top"

    def __call__(self, x: HeadInput) -> HeadOutput:
        logp_T = x.policy_T.clamp(max=0)  # a log-prob, whatever the rounding
        loss_T = -torch.expm1(self.alpha * logp_T) / self.alpha if self.alpha else -logp_T
        p_T = logp_T.detach().exp()
        best_T = x.seg.spread(x.best_GK)
        kept_T = best_T & (p_T >= self.threshold if self.keep == "top" else p_T <= self.threshold)
        scale = best_T.sum() / kept_T.sum().clamp(min=1)
        return HeadOutput(torch.where(kept_T, loss_T * scale, 0), {"prob_sft_threshold/kept": kept_T.to(loss_T.dtype)})
