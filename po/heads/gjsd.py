"""Generalised Jensen-Shannon divergence (GKD): between forward and reverse KL to a teacher's stored distributions.

Paper: Agarwal et al. 2023, On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes,
    arXiv:2306.13649.

    loss_t = beta KL(p || m) + (1 - beta) KL(q || m) - sft log pi(y_t),    m = beta p + (1 - beta) q
    beta = 0: KL(p || q) instead of the two,    beta = 1: KL(q || p)

Symbols: p the teacher's probabilities at position t, q the student's, over the tokens that were stored with the row and
    one more for all others together; sft: the weight of the text itself, 0 in GKD (a second term `sft` does the same).
Length: mean over the tokens of the optimizer step.
Bounded below: yes, by 0.
Pins the level: yes; it is least where the student is the teacher.
Limits: beta = 0 and beta = 1 are cases of their own: the formula itself goes to 0 at both ends. Exact where all tokens
    are stored; otherwise a lower bound (the tokens that are not stored count as one). The others' share counts as 1e-5
    where it is less, in teacher and student: less cannot be told from rounding. gjsd/stored is the teacher's stored
    share. Samples of the student are the user's: sample, score them with the teacher, store.
Departures: as TRL 1.16's gkd at temperature 1, which averages over the micro-batch and needs the teacher's logits; its
    temperature would need them too. TRL's top-k in sdft and sdpo is the student's, here it is what the row stores.
Verified: closed form, gradients for the student's candidates included; the values that TRL 1.16's function gives for
    three betas, loss and gradient, in the test where TRL is installed.
"""

from dataclasses import dataclass
from math import log, log1p
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Le
from torch import Tensor

from po.numeric import log1mexp, masked_logsumexp
from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class GJSD(Head):
    needs: ClassVar[Needs] = Needs(layout="best", unit="token", teacher=True)

    beta: Annotated[float, Ge(0), Le(1)] = 0.5
    sft: Annotated[float, Ge(0)] = 0.0

    def __call__(self, x: HeadInput) -> HeadOutput:
        stored_TM = x.teacher_TM.isfinite()
        p_TM, q_TM = (_with_others(logp_TM, stored_TM) for logp_TM in (x.teacher_TM, x.candidate_TM))
        if self.beta == 0:
            loss_T = _kl(p_TM, q_TM)
        elif self.beta == 1:
            loss_T = _kl(q_TM, p_TM)
        else:
            m_TM = torch.logaddexp(p_TM + log(self.beta), q_TM + log1p(-self.beta))
            loss_T = self.beta * _kl(p_TM, m_TM) + (1 - self.beta) * _kl(q_TM, m_TM)
        return HeadOutput(loss_T - self.sft * x.policy_T, {"gjsd/stored": 1 - p_TM[:, -1].exp()})


def _with_others(logp_TM: Tensor, stored_TM: Tensor) -> Tensor:
    """The log-probs of the stored tokens (very small where there is none), and of all others together."""
    total_T = masked_logsumexp(logp_TM, stored_TM).clamp(max=-1e-5)
    return torch.cat([torch.where(stored_TM, logp_TM, -1e4), log1mexp(total_T)[:, None]], -1)


def _kl(p_TM: Tensor, q_TM: Tensor) -> Tensor:
    return (p_TM.exp() * (p_TM - q_TM)).sum(-1)
