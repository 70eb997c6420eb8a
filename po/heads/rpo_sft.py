"""Regularised Preference Optimization: DPO plus the likelihood of the better response, against over-optimisation.

Paper: Liu et al. 2024, Provably Mitigating Overoptimization in RLHF: Your SFT Loss is Implicitly an Adversarial
    Regularizer, arXiv:2405.16436.

    loss = -log s(b h) + n SFT,    h = log pi/ref(y_w) - log pi/ref(y_l)
        sum_times_beta: SFT = -b sum_i log pi(y_w,i)        token_mean: SFT = -(1/|y_w|) sum_i log pi(y_w,i)

Symbols: s = sigmoid; b = beta; n = eta; sft_reduction: which of the two; |y_w| the tokens, EOS included; y_w the better
    response, whose distribution is the paper's baseline policy in practice, y_l the worse. The metric rpo_sft/nll is
    the negative log-likelihood per token of y_w.
Length: sum; the second term is a mean with token_mean.
Bounded below: yes, by 0.
Pins the level: yes; the second term raises the better response without end.
Limits: eta -> 0 is DPO. The two forms differ by the factor b |y_w| in eta: about 3 for b = 0.01 and 300 tokens.
Departures: none known; sum_times_beta is the authors' alignment-handbook trainer, token_mean their OpenRLHF fork (there
    eta 0.2, beta 0.5). TRL's loss_type [sigmoid, sft] averages over the tokens of the whole batch: that is `loss: [dpo,
    {head: sft, weight: 0.005}]` here. Iterative Reasoning PO (TRL's former rpo_alpha) is token_mean.
Verified: closed form of both; the authors' code was read, not executed; vectors, of TRL 1.16 for dpo plus sft.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Gt
from torch.nn.functional import logsigmoid

from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class RPOSft(Head):
    needs: ClassVar[Needs] = Needs(layout="pair", reference=True, raw_logps=True)

    beta: Annotated[float, Gt(0)] = 0.01
    eta: Annotated[float, Gt(0)] = 0.005
    sft_reduction: Literal["sum_times_beta", "token_mean"] = "sum_times_beta"

    def __call__(self, x: HeadInput) -> HeadOutput:
        chosen_G, rejected_G = x.logratio_GK.unbind(-1)
        mean_G = -x.seg.mean(x.policy_T)[:, 0]
        sum_G = -x.seg.sum(x.policy_T)[:, 0]
        sft_G = self.beta * sum_G if self.sft_reduction == "sum_times_beta" else mean_G
        loss_G = -logsigmoid(self.beta * (chosen_G - rejected_G)) + self.eta * sft_G
        return HeadOutput(loss_G, {"rpo_sft/nll": mean_G.detach()})
