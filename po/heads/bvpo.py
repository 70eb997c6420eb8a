"""BVPO: DPO for reasoning models on two sources of pairs, with a sampled reasoning trace and without thinking.

Paper: Zhu et al. 2025, From Noisy Traces to Stable Gradients: Bias-Variance Optimized Preference Optimization for
    Aligning Large Reasoning Models, arXiv:2510.05095.

    loss = -[a z + (1 - a) (1 - z)] log s(b h),    h = log pi/ref(y_w) - log pi/ref(y_l)

Symbols: s = sigmoid; b = beta; a = alpha, the weight of the pairs with a trace; z is the row's column "thinking", 1
    where the responses contain their reasoning trace, 0 where thinking was off; y_w the better response, y_l the worse.
    The metrics bvpo/trace and bvpo/empty are DPO's loss on the pairs of the one source, 0 on the other's.
Length: sum, the trace included.
Bounded below: yes, by 0.
Pins the level: no.
Limits: a = 1 is DPO on the pairs with a trace, a = 0 on those without, the others counting as pairs of loss 0. a = 1/2
    is half of DPO.
Departures: the paper's objective is a E_trace[DPO] + (1 - a) E_empty[DPO], a mean over each source. Here the mean is
    over all pairs: with a share f of pairs with a trace it is a f E_trace + (1 - a) (1 - f) E_empty, so with as many of
    either it is half of the paper's, and `weight: 2` makes it the same. TRL and HALOs have none.
Unverified: beta; alpha 0.5 is from a summary of the experiments. The paper's text was not at hand.
Verified: closed form; a vector without public counterpart; identity with DPO.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge, Gt, Le
from torch.nn.functional import logsigmoid

from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class BVPO(Head):
    needs: ClassVar[Needs] = Needs(layout="pair", reference=True, columns=("thinking",))

    beta: Annotated[float, Gt(0)] = 0.1
    alpha: Annotated[float, Ge(0), Le(1)] = 0.5

    def __call__(self, x: HeadInput) -> HeadOutput:
        chosen_G, rejected_G = x.logratio_GK.unbind(-1)
        dpo_G = -logsigmoid(self.beta * (chosen_G - rejected_G))
        trace_G, empty_G = x.column_G("thinking") * dpo_G, (1 - x.column_G("thinking")) * dpo_G
        loss_G = self.alpha * trace_G + (1 - self.alpha) * empty_G
        return HeadOutput(loss_G, {"bvpo/trace": trace_G.detach(), "bvpo/empty": empty_G.detach()})

    def start(self, K: int) -> float | None:
        return math.log(2) / 2 if self.alpha == 0.5 else None
