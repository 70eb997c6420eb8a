"""KTO: one labelled response at a time, its value measured against how far the policy has drifted on the whole.

Paper: Ethayarajh et al. 2024, KTO: Model Alignment as Prospect Theoretic Optimization, arXiv:2402.01306.

    loss = lambda_d (1 - s(b (u - z0)))     for a desirable response,      u = log pi/ref(y)
           lambda_u (1 - s(b (z0 - u)))     for an undesirable one
    z0 = max(0, mean over the step's prompts x of log pi/ref(y' | x)),     y' the response of another row

Symbols: s = sigmoid; b = beta; lambda_d, lambda_u weigh the two kinds of rows (the authors: keep lambda_d n_d over
    lambda_u n_u between 1 and 4/3, n the number of rows of a kind); z0 estimates KL(pi || ref) and is a constant;
    estimator: "mean" divides its sum by the prompts, "nonzero" by those whose log pi/ref is not 0.
Length: sum.
Bounded below: yes, by 0.
Pins the level: yes; each response moves relative to z0, and rows far from it have no gradient.
Limits: z0 = 0 is apo_zero_unpaired. z0 is never negative, so a policy that loses likelihood everywhere is not seen;
    the metric kto/mismatch is z0 before the clamp. At policy == reference the loss is lambda / 2, the gradient -+
    lambda b/4.
Departures: none known. z0 is taken over the whole optimizer step; TRL 1.16 takes the mean per device and micro-batch,
    HALOs adds up over ranks and divides by the non-zero ones ("nonzero"). HALOs' clamp of token log-ratios (humanline)
    is left out.
Verified: closed form for both estimators; vectors on which the executed code of HALOs and TRL 1.16 agrees.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Gt

from po.numeric import masked_mean
from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class KTO(Head):
    needs: ClassVar[Needs] = Needs(
        layout="unpaired", unit="response", reference=True, label=True, mismatch=True, couples_batch=True
    )

    beta: Annotated[float, Gt(0)] = 0.1
    lambda_d: Annotated[float, Gt(0)] = 1.0
    lambda_u: Annotated[float, Gt(0)] = 1.0
    estimator: Literal["mean", "nonzero"] = "mean"

    def __call__(self, x: HeadInput) -> HeadOutput:
        some_G = x.seg.valid_GK.any(-1)
        counts_G = some_G if self.estimator == "mean" else some_G & (x.mismatch_G != 0)
        mismatch = masked_mean(x.mismatch_G, counts_G).detach()
        z0 = mismatch.clamp(min=0)
        gap_GK = self.beta * (x.logratio_GK - z0)
        desirable_GK = self.lambda_d * (-gap_GK).sigmoid()
        undesirable_GK = self.lambda_u * gap_GK.sigmoid()
        metrics = {"kto/z0": z0.expand_as(some_G), "kto/mismatch": mismatch.expand_as(some_G)}
        return HeadOutput(torch.where(x.label_GK > 0, desirable_GK, undesirable_GK), metrics)

    def start(self, K: int) -> float | None:
        return self.lambda_d / 2 if self.lambda_d == self.lambda_u else None
