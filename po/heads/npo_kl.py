"""NPO with a KL term: unlearn undesirable rows, hold the policy at the reference on desirable ones.

Paper: Zhang et al. 2024, Negative Preference Optimization: From Catastrophic Collapse to Effective Unlearning,
    arXiv:2404.05868.

    loss = -(2/b) log s(-b u)                          for a row to forget,     u = log pi/ref(y)
           lambda_r (1/|y|) sum_t KL(ref || pi)_t      for a row to retain

Symbols: s = sigmoid; b = beta; lambda_r the weight of a row to retain; rows to forget are labelled undesirable, rows to
    retain desirable; KL over the vocabulary at each token; |y| tokens of the response.
Length: sum for rows to forget, mean for rows to retain.
Bounded below: yes, by 0.
Pins the level: yes.
Limits: npo where there is nothing to retain. The mean is over the rows of both kinds, so their numbers weigh as well.
Departures: the authors' npo_KL takes the mean over all positions of the batch, those of prompts and of padding
    included, and sums the means of the two kinds of rows; here only response tokens count, and each row has its own
    mean.
Verified: closed form; identity with npo. The authors' code was read, not executed.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt
from torch.nn.functional import logsigmoid

from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class NPOKL(Head):
    needs: ClassVar[Needs] = Needs(layout="unpaired", unit="response", reference=True, label=True, token_kl=True)

    beta: Annotated[float, Gt(0)] = 0.1
    lambda_r: Annotated[float, Ge(0)] = 1.0

    def __call__(self, x: HeadInput) -> HeadOutput:
        forget_GK = -2 / self.beta * logsigmoid(-self.beta * x.logratio_GK)
        retain_GK = self.lambda_r * x.seg.mean(x.token_kl_T)
        return HeadOutput(torch.where(x.label_GK < 0, forget_GK, retain_GK))
