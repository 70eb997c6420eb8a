"""BCO with underlying distribution matching: undesirable rows weigh as if their prompts were those of desirable ones.

Paper: Jung et al. 2024, Binary Classifier Optimization for Large Language Model Alignment, arXiv:2404.04656.

    loss = -log s(r - d)           for a desirable response,     r = b log pi/ref(y)
           -w(x) log s(d - r)      for an undesirable one,       w(x) = p(x) / (1 - p(x)), kept within [0.5, 10]
    d = (E+[r] + E-[r]) / 2,  each an exponential moving average over the steps, this one included

Symbols: s = sigmoid; b = beta; p(x) the probability that a prompt is that of a desirable row, by a classifier on prompt
    embeddings; the row's column density_ratio holds p / (1 - p); d the shift, a constant; E+, E- the mean reward of the
    step's desirable and undesirable rows; ema: the share of the past in the averages; shift: "paper" as above, "trl"
    the mean of all rewards since the first step, each row counting once.
Length: sum.
Bounded below: yes, by 0.
Pins the level: yes, around the shift.
Limits: density_ratio = 1 everywhere is bco. The weights do not enter the number of rows that the step divides by, nor
    the shift. A kind of rows that is absent from a step keeps its average.
Departures: the weights, their limits and the unweighted shift are those of TRL's BCOTrainer (gone from 1.16), which
    fits a balanced logistic regression on 1024 prompts itself; here it is fitted beforehand, and stored with the
    rows.
Unverified: the limits of w and whether the paper's shift is weighted too; the rate of the moving average.
Verified: closed form for both shifts, over two steps; identity with bco, whose vectors public code agrees with.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor
from torch.nn.functional import logsigmoid

from po.types import Head, HeadInput, HeadOutput, Needs

LOWEST, HIGHEST = 0.5, 10.0  # limits of the weight


@dataclass(frozen=True)
class BCOMatched(Head):
    needs: ClassVar[Needs] = Needs(
        layout="unpaired",
        unit="response",
        reference=True,
        label=True,
        columns=("density_ratio",),
        couples_batch=True,
        stops_gradient=True,
    )

    beta: Annotated[float, Gt(0)] = 0.1
    shift: Literal["paper", "trl"] = "paper"
    ema: Annotated[float, Ge(0), Lt(1)] = 0.9

    def __call__(self, x: HeadInput) -> HeadOutput:
        r_GK, good_GK = self.beta * x.logratio_GK, x.label_GK > 0
        kinds_2GK = torch.stack([good_GK, ~good_GK]) & x.seg.valid_GK
        rows_2 = kinds_2GK.sum((1, 2))
        mean_2 = (r_GK.detach() * kinds_2GK).sum((1, 2)) / rows_2.clamp(min=1)
        state = self.follow(x.state["mean"], x.state["rows"], mean_2, rows_2)
        seen_2 = state["rows"] if self.shift == "trl" else (state["rows"] > 0).to(r_GK.dtype)
        delta = (state["mean"] * seen_2).sum() / seen_2.sum().clamp(min=1)
        gap_GK = r_GK - delta
        ratio_G = torch.where(x.seg.valid_GK.any(-1), x.column_G("density_ratio"), 1)
        weight_GK = torch.where(good_GK, 1, ratio_G.clamp(LOWEST, HIGHEST)[:, None]).to(r_GK.dtype)
        metrics = {"bco_matched/delta": delta.expand(len(r_GK)), "bco_matched/weight": weight_GK}
        return HeadOutput(-weight_GK * logsigmoid(torch.where(good_GK, gap_GK, -gap_GK)), metrics, state)

    def follow(self, mean_2: Tensor, rows_2: Tensor, new_2: Tensor, more_2: Tensor) -> dict[str, Tensor]:
        """The state after a step: mean reward of desirable and undesirable rows, and how many there have been."""
        total_2 = rows_2 + more_2
        rate_2 = torch.where(rows_2 > 0, 1 - self.ema, 1.0) * (more_2 > 0)
        share_2 = more_2 / total_2.clamp(min=1) if self.shift == "trl" else rate_2
        return {"mean": mean_2 + share_2 * (new_2 - mean_2), "rows": total_2}

    def state(self, rows: int) -> dict[str, Tensor]:
        return {"mean": torch.zeros(2), "rows": torch.zeros(2)}
