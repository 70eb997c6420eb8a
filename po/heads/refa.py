"""REFA: multi-preference optimization without a reference, on length-normalised log-probs.

Paper: Gupta et al. 2024, REFA: Reference Free Alignment for multi-preference optimization, arXiv:2412.16378.

    loss = -log  sum_{k in Y+} exp(z_k)  /  (sum_{k in Y+} exp(z_k) + c sum_{k in Y-} exp(z_k))
    z_k = b (log pi(y_k) / |y_k| + a D_k^p);    D_k = R_k - mean R;    Y+ = {k: D_k > 0},  Y- the others

Symbols: b = beta, on the scale of a mean log-prob; a = alpha, inside beta: in log-probs per unit of reward; c = gamma,
    what a negative weighs in the denominator; p = power, 1 (signed: very bad responses are weighted down) or 2; R the
    rewards; |y| the tokens of a response with EOS.
Length: mean.
Bounded below: yes, by 0.
Pins the level: no; the gradients with respect to the mean log-probs add up to 0 over a group.
Limits: gamma 1 is mpo_multi (signed, its alpha = alpha beta) on mean log-probs without a reference; two responses are
    SimPO with the margin log(gamma) - a b (R_w - R_l). Equal rewards, or one response: Y+ is empty, loss and gradient
    0, and refa/skipped says so; refa/positives is the size of Y+.
Departures: without the paper's regularizer on the probability of the EOS token, which needs to know the token that ends
    a response (a truncated one has none, and templates may put tokens behind it). No code of the authors is known; TRL
    and HALOs have none.
Unverified: the paper's text was not at hand; gamma, alpha's place and the signed power come from secondary sources, and
    the defaults are ours. The EOS regularizer is left out.
Verified: closed form; a vector of an independent script, no public code to run; identity with mpo_multi.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt
from torch.nn.functional import logsigmoid

from po.numeric import masked_center, masked_logsumexp
from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class REFA(Head):
    needs: ClassVar[Needs] = Needs(layout="set", reward=True)

    beta: Annotated[float, Gt(0)] = 5.0
    alpha: Annotated[float, Ge(0)] = 0.1
    gamma: Annotated[float, Ge(1)] = 2.0
    power: Literal[1, 2] = 1

    def __call__(self, x: HeadInput) -> HeadOutput:
        deviation_GK = masked_center(x.reward_GK, x.seg.valid_GK)
        above_GK = deviation_GK > 0
        below_GK = ~above_GK & x.seg.valid_GK
        z_GK = self.beta * (x.seg.mean(x.policy_T) + self.alpha * deviation_GK**self.power)
        margin_G = masked_logsumexp(z_GK, above_GK) - masked_logsumexp(z_GK, below_GK) - math.log(self.gamma)
        some_G = above_GK.any(-1)
        positives_G = above_GK.sum(-1).to(z_GK.dtype)
        metrics = {"refa/positives": positives_G, "refa/skipped": (~some_G).to(z_GK.dtype)}
        return HeadOutput(torch.where(some_G, -logsigmoid(margin_G), 0), metrics)
