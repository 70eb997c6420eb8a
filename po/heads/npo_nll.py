"""NPO with a retain term: unlearn undesirable rows, keep desirable ones by their likelihood.

Paper: Zhang et al. 2024, Negative Preference Optimization: From Catastrophic Collapse to Effective Unlearning,
    arXiv:2404.05868.

    loss = -(2/b) log s(-b u)                          for a row to forget,     u = log pi/ref(y)
           lambda_r (-1/|y|) sum_t log pi(y_t)         for a row to retain

Symbols: s = sigmoid; b = beta; lambda_r the weight of a row to retain; rows to forget are labelled undesirable, rows to
    retain desirable; |y| tokens of the response.
Length: sum for rows to forget, mean for rows to retain.
Bounded below: yes, by 0.
Pins the level: yes.
Limits: npo where there is nothing to retain. The mean is over the rows of both kinds, so their numbers weigh as well:
    the authors' sum of two means is twice this where half of the rows are to be retained.
Departures: the authors' npo_grad_diff draws one row to retain for each row to forget, and takes the mean over all
    tokens of a batch, where long answers weigh more; here each row has its own mean.
Verified: closed form; identities with npo and the NLL. The authors' code was read, not executed.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt
from torch.nn.functional import logsigmoid

from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class NPONLL(Head):
    needs: ClassVar[Needs] = Needs(layout="unpaired", unit="response", reference=True, label=True, raw_logps=True)

    beta: Annotated[float, Gt(0)] = 0.1
    lambda_r: Annotated[float, Ge(0)] = 1.0

    def __call__(self, x: HeadInput) -> HeadOutput:
        forget_GK = -2 / self.beta * logsigmoid(-self.beta * x.logratio_GK)
        retain_GK = -self.lambda_r * x.seg.mean(x.policy_T)
        return HeadOutput(torch.where(x.label_GK < 0, forget_GK, retain_GK))
