"""DCKD: learn a preference-tuned teacher's distributions along both responses of a pair, and the better one's text.

Paper: Gao et al. 2025, Advantage-Guided Distillation for Preference Alignment in Small Language Models,
    arXiv:2502.17927; the first of its two methods (Dual-Constrained Knowledge Distillation).

    loss = sft NLL(y_w) + chosen D(y_w) + rejected D(y_l)
    NLL(y) = -(1/|y|) sum_t log pi(y_t),    D(y) = (1/|y|) sum_t sum_a p_t(a) (log p_t(a) - log pi(a))

Symbols: p_t the teacher's probabilities at position t; a runs over the tokens that were stored with the row, the
    teacher's likeliest; sft, chosen, rejected: the weights of the three parts; y_w the better response, y_l the worse.
Length: mean over each response's tokens.
Bounded below: yes; D by P log P, where P is the stored tokens' share of the teacher's probability (by 0 if P = 1).
Pins the level: yes; it is maximum likelihood towards the teacher, on the better response also towards the text.
Limits: chosen = rejected = 0 is supervised fine-tuning. The stored probabilities are not renormalised and the others
    pull nowhere, so D is least where the stored tokens have all of the student's probability, in the teacher's
    proportions. `dckd/stored` says which share P of the teacher's is stored.
Departures: each response's tokens are averaged, then the pairs; the authors' code averages over all tokens of its
    batch, where long responses count more. It also overwrites student probabilities below 1e-7, which stops their
    gradient; log-softmax needs no floor. TRL's gkd distils on the student's own samples; HALOs has no distillation.
Unverified: the paper's normalisation and its weights (the text was not at hand; the code's weights default to 0, here
    to 1), and whether the rest of both distributions counts as one more token.
Verified: closed form, gradients for the student's candidates included; no public code was run.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge

from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class DCKD(Head):
    needs: ClassVar[Needs] = Needs(layout="pair", teacher=True)

    sft: Annotated[float, Ge(0)] = 1.0
    chosen: Annotated[float, Ge(0)] = 1.0
    rejected: Annotated[float, Ge(0)] = 1.0

    def __call__(self, x: HeadInput) -> HeadOutput:
        p_TM = x.teacher_TM.exp()
        gap_TM = torch.where(x.teacher_TM.isfinite(), x.teacher_TM - x.candidate_TM, 0)
        kl_GK = x.seg.mean((p_TM * gap_TM).sum(-1))
        nll_G = -x.seg.mean(x.policy_T)[:, 0]
        loss_G = self.sft * nll_G + self.chosen * kl_GK[:, 0] + self.rejected * kl_GK[:, 1]
        metrics = {"dckd/kl": kl_GK.detach(), "dckd/nll": nll_G.detach(), "dckd/stored": p_TM.sum(-1)}
        return HeadOutput(loss_G, metrics)
