"""Odds Ratio Preference Optimization: fine-tuning on the better response plus a penalty on the worse one's odds.

Paper: Hong et al. 2024, ORPO: Monolithic Preference Optimization without Reference Model, arXiv:2403.07691.

    loss = -m(y_w) - l log s(o(y_w) - o(y_l)),    o(y) = m(y) - log(1 - exp m(y)),    m(y) = (1/|y|) sum_i log pi(y_i)

Symbols: s = sigmoid; l = lam (the paper's lambda), the weight of the odds ratio; o the log-odds of the response's mean
    token; |y| its tokens, EOS included; y_w the better response, y_l the worse.
Length: mean.
Bounded below: yes, by 0.
Pins the level: yes, upwards; the first term is the better response's negative log-likelihood.
Limits: the odds diverge as m -> 0: m counts as -1e-6 at most, so a response known by heart has log-odds 13.8 without
    gradient. lam = 0 is fine-tuning on each better response, by its own tokens.
Departures: the first term averages over the response's own tokens, then over pairs; the authors' and TRL 1.16's over
    all tokens of the micro-batch, and the authors' over the prompt's too unless told otherwise. TRL calls lam beta; the
    authors' code has 1.0 where it is not set.
Verified: closed form; a vector on which the executed odds ratio of TRL 1.16 agrees.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge
from torch.nn.functional import logsigmoid

from po.numeric import log1mexp
from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class ORPO(Head):
    needs: ClassVar[Needs] = Needs(layout="pair")

    lam: Annotated[float, Ge(0)] = 0.1

    def __call__(self, x: HeadInput) -> HeadOutput:
        mean_GK = x.seg.mean(x.policy_T)
        under_GK = mean_GK.clamp(max=-1e-6)
        chosen_G, rejected_G = (under_GK - log1mexp(under_GK)).unbind(-1)
        ratio_G = chosen_G - rejected_G
        nll_G = -mean_GK[:, 0]
        metrics = {"orpo/log_odds_ratio": ratio_G.detach(), "orpo/nll": nll_G.detach()}
        return HeadOutput(nll_G - self.lam * logsigmoid(ratio_G), metrics)
