"""PMPO: accepted responses up, rejected ones down, with a KL term that keeps the sum from running away.

Paper: Abdolmaleki et al. 2024, Preference Optimization as Probabilistic Inference, arXiv:2410.04166.

    loss = -a E+[log pi(y)] + (1 - a) E-[log pi(y)] + b E[sum_t KL(ref || pi)_t]

Symbols: a = alpha, the weight of the accepted side; b = beta; E+, E- the means over the prompt's accepted and
    rejected responses, E over all of them, unlabelled ones included; KL over the vocabulary at each token, summed
    over a response.
Length: sum.
Bounded below: no, where alpha < 1 and beta is small; the KL term bounds it.
Pins the level: yes.
Limits: alpha = 1, beta = 0 is maximum likelihood of the accepted responses; alpha = 0 learns from rejected ones alone
    and wants a large beta. A side that is absent from a prompt drops out, and the other keeps its weight;
    pmpo/one_sided is the share of such prompts.
Departures: none known in the formula; the published recipe samples four responses per prompt, accepts the best two and
    renews the reference from time to time, which is left to the data and the user.
Unverified: alpha = beta = 0.5 and the sums over tokens come from third-party implementations, which differ in the
    length normalisation; that the KL is taken on the labelled responses is our reading.
Verified: closed form; a vector of an independent script (no public code was executed); identities with plain NLL.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge, Le

from po.numeric import masked_mean
from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class PMPO(Head):
    needs: ClassVar[Needs] = Needs(layout="labelled", label=True, token_kl=True)

    alpha: Annotated[float, Ge(0), Le(1)] = 0.5
    beta: Annotated[float, Ge(0)] = 0.5

    def __call__(self, x: HeadInput) -> HeadOutput:
        logp_GK, valid_GK = x.seg.sum(x.policy_T), x.seg.valid_GK
        accepted_GK, rejected_GK = valid_GK & (x.label_GK > 0), valid_GK & (x.label_GK < 0)
        kl_G = masked_mean(x.seg.sum(x.token_kl_T), valid_GK)
        up_G, down_G = masked_mean(logp_GK, accepted_GK), masked_mean(logp_GK, rejected_GK)
        loss_G = -self.alpha * up_G + (1 - self.alpha) * down_G + self.beta * kl_G
        one_sided_G = accepted_GK.any(-1) != rejected_GK.any(-1)
        return HeadOutput(loss_G, {"pmpo/kl": kl_G.detach(), "pmpo/one_sided": one_sided_G.to(loss_G.dtype)})
