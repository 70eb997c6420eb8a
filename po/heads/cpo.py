"""Contrastive Preference Optimization: DPO under a uniform reference, plus the better response's likelihood.

Paper: Xu et al. 2024, Contrastive Preference Optimization: Pushing the Boundaries of LLM Performance in Machine
    Translation, arXiv:2401.08417.

    loss = -log s(b (log pi(y_w) - log pi(y_l))) - a (1/|y_w|) log pi(y_w)

Symbols: s = sigmoid; b = beta; a = alpha, the weight of the likelihood (TRL: cpo_alpha); |y_w| the tokens of y_w, EOS
    included; y_w the better response, y_l the worse.
Length: sum in the first term, mean in the second.
Bounded below: yes, by 0.
Pins the level: yes, upwards, by the second term; with alpha = 0 no.
Limits: sums without a reference favour short responses.
Departures: the likelihood averages over the response's own tokens, then over pairs; the authors' code and TRL 1.16
    average over all tokens of the micro-batch. With alpha 0 and a second term {head: sft, weight: 1.0} it is all tokens
    of the step. TRL's label_smoothing is not there.
Unverified: whether the paper itself sums the likelihood over tokens; its text was not at hand.
Verified: closed form; a vector with alpha 0 on which the executed code of TRL 1.16 agrees.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge, Gt
from torch.nn.functional import logsigmoid

from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class CPO(Head):
    needs: ClassVar[Needs] = Needs(layout="pair")

    beta: Annotated[float, Gt(0)] = 0.1
    alpha: Annotated[float, Ge(0)] = 1.0

    def __call__(self, x: HeadInput) -> HeadOutput:
        chosen_G, rejected_G = x.seg.sum(x.policy_T).unbind(-1)
        nll_G = -x.seg.mean(x.policy_T)[:, 0]
        contrast_G = -logsigmoid(self.beta * (chosen_G - rejected_G))
        return HeadOutput(contrast_G + self.alpha * nll_G, {"cpo/nll": nll_G.detach()})
