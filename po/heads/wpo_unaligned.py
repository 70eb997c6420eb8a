"""WPO without weight alignment: DPO that weighs a pair by the probability per token of its two responses.

Paper: Zhou et al. 2024, WPO: Enhancing RLHF with Weighted Preference Optimization, arXiv:2406.11827.

    loss = -w(y_w) w(y_l) log s(b h),    h = log pi/ref(y_w) - log pi/ref(y_l)
        log w(y) = (1/|y|) sum_i log pi(y_i)

Symbols: s = sigmoid; b = beta; |y| the tokens, EOS included; y_w the better response, y_l the worse. The weights carry
    no gradient. The metric wpo_unaligned/weight is their product.
Length: sum; the weights are means.
Bounded below: yes, by 0.
Pins the level: no.
Limits: weights 1 are DPO. Weights are below 1, and small for a policy of high entropy even on its own samples, which is
    what `wpo` corrects at the price of a sum over the vocabulary.
Departures: what the paper's alignment starts from; TRL 1.16 and the authors' code have only the aligned form. A clamp
    at 1 would change nothing. The exponent ends at 20, beyond what probabilities reach. HALOs has none.
Unverified: how the paper's experiments use this form, whose text was not at hand.
Verified: closed form; a vector, down to logits, without public counterpart; identity with DPO.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Gt
from torch.nn.functional import logsigmoid

from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class WPOUnaligned(Head):
    needs: ClassVar[Needs] = Needs(layout="pair", reference=True, raw_logps=True, stops_gradient=True)

    beta: Annotated[float, Gt(0)] = 0.01

    def __call__(self, x: HeadInput) -> HeadOutput:
        chosen_G, rejected_G = x.logratio_GK.unbind(-1)
        weight_G = x.seg.mean(x.policy_T.detach()).clamp(max=20).sum(-1).exp()
        loss_G = -weight_G * logsigmoid(self.beta * (chosen_G - rejected_G))
        return HeadOutput(loss_G, {"wpo_unaligned/weight": weight_G})
