"""UniSD's agreement weights: self-distillation that listens less where several teachers disagree.

Paper: Jin et al. 2026, UniSD: Towards a Unified Self-Distillation Framework for Large Language Models,
    arXiv:2605.06597.

    loss = sum_t w_t l_t / max(sum_t w_t, 1)
    token: w_t = max(1 / (1 + gamma min(v_t / q95, 10)), 0.01),    sequence: w_t = max(exp(-gamma mean_t v_t), 1e-6)
    forward: l_t = -sg(min(pi_T/pi(y_t), clip)) log pi(y_t)
    reverse: l_t = sg(clamp(log pi(y_t) - log pi_T(y_t), -clip, clip)) log pi(y_t)

Symbols: sg = no gradient; pi_T the same weights after the row's privileged prompt, the first teacher; y sampled from
    pi; v_t >= 0 how far the log-probs of y_t under K teachers are apart (their variance or range), in the column
    `spread` of the tokens; granularity: one weight per token, or per sequence, where the column holds the spread of the
    teachers' mean log-probs at every token; gamma: the strength; q95: the 95th percentile of v_t, which makes it a
    number without scale; divergence: which KL, estimated at y_t; clip: the bound of its weight.
    normalizer: weights, or length, which divides by |y|.
Length: mean, weighted.
Bounded below: no; the printed loss is a surrogate.
Pins the level: forward yes, it is likelihood of what the teacher finds likelier; reverse no.
Limits: gamma = 0 is no weighting, with divergence reverse sdft without importance weights. In the authors' normalizer
    (weights) a weight that all tokens of a response share cancels, unless the weights add up to less than 1: there
    granularity sequence does next to nothing, and token weights are relative within the response. normalizer length
    keeps them.
Departures: the authors take KL or JSD over the whole vocabulary and clip its value from above (10 in their runs, off in
    their defaults); here KL is estimated at the sampled token, and clip bounds its weight. They measure q95 on each
    batch; here it is a constant that the user measures, so that a loss does not depend on its neighbours. Not here:
    JSD, the contrastive hinge, matching of hidden states, the moving-average teacher, the mean importance ratio.
Unverified: gamma's default (the code's is 0, off); the estimates at sampled tokens, which are this package's. The
    paper's text was not at hand.
Verified: closed form of every option; the weights were compared with the authors' code by reading, none of it was run.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt
from torch import Tensor

from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class UniSD(Head):
    needs: ClassVar[Needs] = Needs(
        layout="best", unit="response", privileged=True, token_columns=("spread",), stops_gradient=True
    )

    gamma: Annotated[float, Ge(0)] = 1.0
    q95: Annotated[float, Gt(0)] = 1.0
    granularity: Literal["token", "sequence"] = "token"
    normalizer: Literal["weights", "length"] = "weights"
    divergence: Literal["forward", "reverse"] = "forward"
    clip: Annotated[float, Gt(0)] = 10.0

    def __call__(self, x: HeadInput) -> HeadOutput:
        gap_T = (x.privileged_T - x.policy_T).detach()
        if self.divergence == "forward":
            pull_T = gap_T.clamp(max=20).exp().clamp(max=self.clip)
        else:
            pull_T = gap_T.clamp(-self.clip, self.clip)
        weight_T = self._weight(x)
        total_GK = x.seg.sum(weight_T) if self.normalizer == "weights" else x.seg.length_GK
        loss_GK = -x.seg.sum(weight_T * pull_T * x.policy_T) / total_GK.clamp(min=1)
        return HeadOutput(loss_GK, {"unisd/weight": weight_T, "unisd/gap": gap_T})

    def _weight(self, x: HeadInput) -> Tensor:
        spread_T = x.token_column_T("spread")
        if self.granularity == "token":
            return (1 / (1 + self.gamma * (spread_T / self.q95).clamp(0, 10))).clamp(min=0.01)
        return x.seg.spread((-self.gamma * x.seg.mean(spread_T)).exp().clamp(1e-6, 1))
