"""Supervised fine-tuning on probabilities instead of log-probabilities: -p, -p^k and what lies between them and NLL.

Paper: Li et al. 2025, Beyond Log Likelihood: Probability-Based Objectives for Supervised Fine-Tuning across the Model
    Capability Continuum, arXiv:2510.00526.

    loss_t = (1 - p_t^a) / a,    a = 0: -log p_t,    p_t = pi(y_t | x, y_<t)    for the tokens of the best response

Symbols: a = alpha: 0 is the negative log-likelihood, 1 is 1 - p (the paper's -p), 10 its -p^10; y the response with the
    highest reward, or the first where there are no rewards.
Length: mean over the tokens of the optimizer step.
Bounded below: yes, by 0; above by 1 / a.
Pins the level: yes; it raises the likelihood of the best response, least for tokens the model finds unlikely.
Limits: alpha 0 is sft. The gradient with respect to log p_t is -p_t^a, at most 1 and close to 0 for unlikely tokens, so
    a term beside a preference loss wants a larger weight than with NLL. prob_sft/p is the mean probability of a token.
Departures: as the authors' `p` (alpha 1) and `GeneralFamily-alpha`; their `logp` is sft, their thresholds are
    prob_sft_threshold. TRL's `dft` is p (detached) times the NLL: the same gradient as alpha 1, another value.
Verified: closed form; vectors of an independent script from the formulas of the authors' code, which was read and not
    run; identity with sft.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge

from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class ProbSFT(Head):
    needs: ClassVar[Needs] = Needs(layout="best", unit="token")

    alpha: Annotated[float, Ge(0)] = 1.0

    def __call__(self, x: HeadInput) -> HeadOutput:
        logp_T = x.policy_T.clamp(max=0)  # a log-prob, whatever the rounding
        loss_T = -torch.expm1(self.alpha * logp_T) / self.alpha if self.alpha else -logp_T
        return HeadOutput(loss_T, {"prob_sft/p": logp_T.detach().exp()})
