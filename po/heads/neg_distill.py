"""Negative distillation: supervised fine-tuning that keeps away from what a negative teacher would say there.

Paper: Li et al. 2022, Diversifying Neural Dialogue Generation via Negative Distillation, arXiv:2205.02795; its loss on
    the prediction layer ("soft unlikelihood").

    loss_t = -(1 - a) log pi(y_t) - a sum_v p_t(v) log(1 - pi(v))    for the tokens of the best response

Symbols: a = alpha; p_t the negative teacher's probabilities at position t; v runs over the tokens that were stored with
    the row, the teacher's likeliest; y the response with the highest reward, or the first where there are no rewards.
Length: mean over the tokens of the optimizer step.
Bounded below: yes, by 0.
Pins the level: yes, for alpha < 1; alpha 1 only pushes away, and stops where the teacher's tokens have no probability.
Limits: alpha 0 is sft. Preferences come in by the teacher: a model fine-tuned on the rejected responses, scored along
    the chosen ones. Where it agrees with the text the two parts pull against each other; the teacher's temperature, 1
    in the paper, is applied when it is stored. `neg_distill/stored` says which share of its probability that is.
Departures: only the prediction layer; the paper adds exp(-squared distance) of hidden states and of attention scores to
    the negative part. alpha is constant: the paper's rises to 1 and falls again over the run (4 s'(6 step / 25600 - 6),
    s' the sigmoid's derivative), and a head does not see the step. The paper sums over a response. A probability pi(v)
    of more than 1 - 1e-6 is not pushed further. The paper's teacher is trained on generic replies. TRL and HALOs have
    none.
Unverified: log(1 - pi(v)): the equation's second line was missing in the text at hand; it is read from the paper's
    equation of unlikelihood, which this one softens. That this is what preference work means by the name: Negative
    Self-Distillation (arXiv:2609.11699) is another method, on samples of the policy. The default of alpha is ours.
Verified: closed form, gradients for the student's candidates included; identity with sft; no public code is known.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Le

from po.numeric import log1mexp
from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class NegDistill(Head):
    needs: ClassVar[Needs] = Needs(layout="best", unit="token", teacher=True)

    alpha: Annotated[float, Ge(0), Le(1)] = 0.5

    def __call__(self, x: HeadInput) -> HeadOutput:
        stored_TM = x.teacher_TM.isfinite()
        p_TM = torch.where(stored_TM, x.teacher_TM, -torch.inf).exp()
        away_TM = log1mexp(torch.where(stored_TM, x.candidate_TM, -1).clamp(max=-1e-6))
        unlikelihood_T = -(p_TM * away_TM).sum(-1)
        metrics = {"neg_distill/nll": -x.policy_T.detach(), "neg_distill/unlikelihood": unlikelihood_T.detach()}
        loss_T = -(1 - self.alpha) * x.policy_T + self.alpha * unlikelihood_T
        return HeadOutput(loss_T, metrics | {"neg_distill/stored": p_TM.sum(-1)})
