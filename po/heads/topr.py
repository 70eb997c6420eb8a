"""Tapered Off-Policy REINFORCE (TOPR): likelihood on good samples, truncated importance sampling on bad ones.

Paper: Le Roux et al. 2025, Tapered Off-Policy REINFORCE: Stable and efficient reinforcement learning for LLMs,
    arXiv:2503.14286.

    loss = -w (R - c) log pi(y),    R = +1 or -1 (the label)
    w = 1 for R = +1,    w = min(pi(y) / mu(y), 1) for R = -1, not differentiated

Symbols: mu the policy that sampled y, whose log-probs the rows carry; the ratio is of whole responses; c = baseline,
    which only shifts the effective share of positives, p(1 - c) / (1 + c (1 - 2 p)) for a share p; length_normalize:
    divides a response's loss by its tokens, as the paper's experiments do; truncate_positives: the truncated ratio for
    positives too (TIS).
Length: sum; mean with length_normalize.
Bounded below: yes for the objective that this gradient descends; the printed loss is a surrogate and may be anything.
Pins the level: yes; positives rise, negatives fall until pi(y) / mu(y) takes their weight away.
Limits: w = 1 everywhere is REINFORCE off-policy, which collapses; at pi = mu all are REINFORCE. Ratios of long
    responses underflow after little drift, so negatives fade early: that is the method (metrics topr/weight and
    topr/faded, the share with a weight below 0.1).
Departures: the ranges of the two clips are the paper's canonical ones. ROLL's variant (per-token ratios, advantages
    instead of R) is another loss. Offline here: mu is whoever sampled the rows. TRL and HALOs have none.
Unverified: the paper's text was not at hand: formula and the division by length come from notes that agree with one
    another.
Verified: closed form, sum, mean and TIS; vectors of an independent script, no public code of this form to run.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Gt, Lt

from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class TOPR(Head):
    needs: ClassVar[Needs] = Needs(layout="unpaired", unit="response", label=True, behaviour=True, stops_gradient=True)

    baseline: Annotated[float, Gt(-1), Lt(1)] = 0.0
    length_normalize: bool = False
    truncate_positives: bool = False

    def __call__(self, x: HeadInput) -> HeadOutput:
        R_GK = x.label_GK.to(x.policy_T.dtype)
        ratio_GK = x.seg.sum(x.policy_T.detach() - x.old_T).clamp(max=0).exp()
        weight_GK = ratio_GK if self.truncate_positives else torch.where(R_GK < 0, ratio_GK, 1)
        logp_GK = x.seg.mean(x.policy_T) if self.length_normalize else x.seg.sum(x.policy_T)
        metrics = {"topr/weight": weight_GK, "topr/faded": (weight_GK < 0.1).to(weight_GK.dtype)}
        return HeadOutput(-weight_GK * (R_GK - self.baseline) * logp_GK, metrics)
