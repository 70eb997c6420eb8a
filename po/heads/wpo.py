"""Weighted Preference Optimization (WPO): DPO that weighs a pair by how much the policy itself would write it.

Paper: Zhou et al. 2024, WPO: Enhancing RLHF with Weighted Preference Optimization, arXiv:2406.11827.

    loss = -w(y_w) w(y_l) log s(b h),    h = log pi/ref(y_w) - log pi/ref(y_l)
        log w(y) = (1/|y|) sum_i [log pi(y_i) - log sum_v pi(v)^2]

Symbols: s = sigmoid; b = beta; v runs over the vocabulary at position i, so that text sampled from the policy has
    weights around 1 (the paper's sampled alignment); |y| the tokens, EOS included; clamp: the product of the two
    weights is at most 1; y_w the better response, y_l the worse. The weights carry no gradient. The metric wpo/weight
    is their product.
Length: sum; the weights are means.
Bounded below: yes, by 0.
Pins the level: no.
Limits: weights 1 are DPO. Without clamp a weight can exceed 1, yet not (sqrt(V) + 1) / 2 for V words in the vocabulary.
Departures: as TRL 1.16 `use_weighting`, without clamp; the authors' code is clamp: true. Weights multiply the loss and
    are not normalised: the mean is over pairs. The exponent ends at 20, beyond what probabilities reach.
    open-instruct's wpo has no alignment term and lets the gradient through its weights. HALOs has none.
Unverified: that the paper's text does not clamp, which only its code says it does.
Verified: closed form; a vector, down to logits, on which the executed code of TRL 1.16 agrees; the clamp: authors' code
    read, not executed.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Gt
from torch.nn.functional import logsigmoid

from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class WPO(Head):
    needs: ClassVar[Needs] = Needs(layout="pair", reference=True, collision=True, raw_logps=True, stops_gradient=True)

    beta: Annotated[float, Gt(0)] = 0.01
    clamp: bool = False

    def __call__(self, x: HeadInput) -> HeadOutput:
        chosen_G, rejected_G = x.logratio_GK.unbind(-1)
        log_weight_GK = x.seg.mean(x.policy_T.detach() - x.collision_T).clamp(max=20)
        log_weight_G = log_weight_GK.sum(-1)
        weight_G = (log_weight_G.clamp(max=0) if self.clamp else log_weight_G).exp()
        return HeadOutput(-weight_G * logsigmoid(self.beta * (chosen_G - rejected_G)), {"wpo/weight": weight_G})
