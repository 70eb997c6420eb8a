"""Binary Classifier Optimization: the implicit reward as the logit of "desirable", around a shift that follows it.

Paper: Jung et al. 2024, Binary Classifier Optimization for Large Language Model Alignment, arXiv:2404.04656.

    loss = -log s(r - d)     for a desirable response,     r = b log pi/ref(y)
           -log s(d - r)     for an undesirable one
    d = (E+[r] + E-[r]) / 2,  each an exponential moving average over the steps, this one included

Symbols: s = sigmoid; b = beta; d the shift, a constant; E+, E- the mean reward of the step's desirable and undesirable
    rows; ema: the share of the past in the averages; shift: "paper" as above, "trl" the mean of all rewards since the
    first step, each row counting once.
Length: sum.
Bounded below: yes, by 0.
Pins the level: yes, around the shift.
Limits: never below DPO's loss of the same two responses; near it where d is near the middle of their rewards. A kind of
    rows that is absent from a step keeps its average; until it has been seen, d is the other kind's. d = 0 is TRL
    1.16's `bco_pair`, which has no shift.
Departures: TRL's BCOTrainer (gone from 1.16) takes the cumulative mean (shift "trl"), which leans to the more frequent
    label. The averages are those of whole optimizer steps, and kept in checkpoints.
Unverified: the rate of the moving average, and whether the paper averages over the step or over a running window.
Verified: closed form for both shifts, over two steps; vectors on which TRL 1.10's executed bco_loss and, without a
    shift, TRL 1.16's `bco_pair` agree; the gap to DPO.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor
from torch.nn.functional import logsigmoid

from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class BCO(Head):
    needs: ClassVar[Needs] = Needs(
        layout="unpaired", unit="response", reference=True, label=True, couples_batch=True, stops_gradient=True
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
        metrics = {"bco/delta": delta.expand(len(r_GK))}
        return HeadOutput(-logsigmoid(torch.where(good_GK, gap_GK, -gap_GK)), metrics, state)

    def follow(self, mean_2: Tensor, rows_2: Tensor, new_2: Tensor, more_2: Tensor) -> dict[str, Tensor]:
        """The state after a step: mean reward of desirable and undesirable rows, and how many there have been."""
        total_2 = rows_2 + more_2
        rate_2 = torch.where(rows_2 > 0, 1 - self.ema, 1.0) * (more_2 > 0)
        share_2 = more_2 / total_2.clamp(min=1) if self.shift == "trl" else rate_2
        return {"mean": mean_2 + share_2 * (new_2 - mean_2), "rows": total_2}

    def state(self, rows: int) -> dict[str, Tensor]:
        return {"mean": torch.zeros(2), "rows": torch.zeros(2)}

    def start(self, K: int) -> float:
        return math.log(2)
