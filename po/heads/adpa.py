"""ADPA: move the student's distribution to the tokens that a teacher's preference tuning made likelier.

Paper: Gao et al. 2025, Advantage-Guided Distillation for Preference Alignment in Small Language Models,
    arXiv:2502.17927; the second of its two methods.

    loss = sft NLL(y_w) - advantage (1/|y_l|) sum_t sum_a pi(a) A_t(a),    A_t(a) = log p_t(a) - log q_t(a)
    NLL(y) = -(1/|y|) sum_t log pi(y_t)

Symbols: p_t the tuned teacher's probabilities at position t, q_t those of its own reference; a runs over the tokens
    that were stored with the row; y_w the better response; y_l the student's own sample, which stands in the place of
    the worse response; sft, advantage: the weights of the two parts.
Length: mean over each response's tokens.
Bounded below: yes, by minus the largest advantage (or 0).
Pins the level: yes; on the whole vocabulary the best policy is the token with the largest advantage and nothing else.
Limits: an advantage that is the same for all tokens of the vocabulary has no gradient. The gradient for the logits is
    -pi(a) (A(a) - sum pi A): tokens that the student finds impossible stay so. Tokens that are not stored have A = 0.
    Nothing but the NLL, the learning rate and an early end keeps the policy from collapsing.
Departures: each response's tokens are averaged, then the pairs; the authors' code averages over all tokens of its
    batch. Its optional KL penalty is not here, nor its importance sampling, which multiplies the averaged loss of the
    batch by a weight with a gradient. TRL and HALOs have no ADPA.
Unverified: the paper's normalisation and its weights (the text was not at hand; the code's weights default to 0, here
    to 1).
Verified: closed form, gradients for the student's candidates included; a vector of one token with its gradient for
    the logits, whose inputs are inferred. No public code was run.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt

from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class ADPA(Head):
    needs: ClassVar[Needs] = Needs(layout="pair", teacher=True, teacher_ref=True)

    sft: Annotated[float, Ge(0)] = 1.0
    advantage: Annotated[float, Gt(0)] = 1.0

    def __call__(self, x: HeadInput) -> HeadOutput:
        stored_TM = x.teacher_TM.isfinite() & x.teacher_ref_TM.isfinite()
        advantage_TM = torch.where(stored_TM, x.teacher_TM, 0) - torch.where(stored_TM, x.teacher_ref_TM, 0)
        pi_TM = torch.where(stored_TM, x.candidate_TM, 0).exp()
        gain_G = x.seg.mean((pi_TM * advantage_TM).sum(-1))[:, 1]
        nll_G = -x.seg.mean(x.policy_T)[:, 0]
        metrics = {"adpa/advantage": gain_G.detach(), "adpa/nll": nll_G.detach()}
        return HeadOutput(self.sft * nll_G - self.advantage * gain_G, metrics)
