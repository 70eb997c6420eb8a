"""Feasible Learning on DPO: every pair is to reach a loss of epsilon, and multipliers weigh those that do not.

Paper: Ramirez et al. 2025, Feasible Learning, arXiv:2501.14912.

    loss = w l,    then  w <- max(0, w + dual_lr (l - epsilon - w / a))  for each pair of the step    (primal_dual)
           (a / 2) max(0, l - epsilon)^2                                                           (clamped)
    l = -log s(b (log pi/ref(y_w) - log pi/ref(y_l)))

Symbols: s = sigmoid; b = beta; l the pair's DPO loss; epsilon, what it is to reach; w the row's multiplier, 1 before
    its first visit; a = alpha, how far the demand may be relaxed: smaller asks less of hard pairs; dual_lr, the step of
    the multipliers; algorithm: "primal_dual" (the paper's), or "clamped": the multiplier at its best value, a max(0, l
    - epsilon), for which dual_lr has no part; y_w the better response, y_l the worse.
Length: sum.
Bounded below: yes, by 0.
Pins the level: no.
Limits: a pair at or below epsilon loses its weight over its visits, and with clamped at once. dual_lr = alpha = 1 makes
    the next visit's weight the last one's slack. alpha = inf (in a recipe 1e12) is plain Feasible Learning, without
    relaxation, for primal_dual only. Multipliers belong to rows and change on a visit, so the
    head wants several epochs. Evaluation starts them anew, at 1: primal_dual then shows the DPO loss.
Departures: the defaults are the authors' experiments'; their trainer's are epsilon 0.001 and alpha 2. Their clamped
    loss lacks the 1/2: it is ours with alpha 2; their scripts ask for "clamped-erm", which their code does not know and
    trains as plain DPO. TRL and HALOs have no such loss.
Verified: closed form; vectors of an independent script for both losses and for the multipliers; the authors' code was
    read, not executed.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor
from torch.nn.functional import logsigmoid

from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class FeasibleDPO(Head):
    needs: ClassVar[Needs] = Needs(layout="pair", reference=True, row=True, couples_batch=True)

    beta: Annotated[float, Gt(0)] = 0.1
    epsilon: Annotated[float, Ge(0)] = 0.3
    alpha: Annotated[float, Gt(0)] = 1.0
    dual_lr: Annotated[float, Gt(0)] = 1.0
    algorithm: Literal["primal_dual", "clamped"] = "primal_dual"

    def __post_init__(self) -> None:
        if self.algorithm == "clamped" and math.isinf(self.alpha):
            raise ValueError("feasible_dpo: algorithm 'clamped' needs a finite alpha; 'primal_dual' takes inf")

    def state(self, rows: int) -> dict[str, Tensor]:
        return {"multiplier": torch.ones(rows)}

    def __call__(self, x: HeadInput) -> HeadOutput:
        chosen_G, rejected_G = x.logratio_GK.unbind(-1)
        dpo_G = -logsigmoid(self.beta * (chosen_G - rejected_G))
        slack_G, before = dpo_G - self.epsilon, x.state["multiplier"]
        weight_G = before[x.row_G.clamp(min=0)].to(dpo_G.dtype)
        if self.algorithm == "primal_dual":
            loss_G = weight_G * dpo_G
            next_G = (weight_G + self.dual_lr * (slack_G.detach() - weight_G / self.alpha)).relu()
        else:
            loss_G = self.alpha / 2 * slack_G.relu() ** 2
            weight_G = next_G = self.alpha * slack_G.detach().relu()
        at_G = torch.where(x.seg.valid_GK.all(-1), x.row_G, len(before))  # empty groups write beside the table
        after = torch.cat([before, before.new_zeros(1)]).index_copy(0, at_G, next_G.to(before.dtype))[:-1]
        feasible_G = (slack_G.detach() <= 0).to(dpo_G.dtype)
        metrics = {"feasible_dpo/multiplier": weight_G, "feasible_dpo/feasible": feasible_G}
        return HeadOutput(loss_G, metrics | {"feasible_dpo/slack": slack_G.detach()}, {"multiplier": after})

    def start(self, K: int) -> float:
        if self.algorithm == "primal_dual":
            return math.log(2)
        return self.alpha / 2 * max(0.0, math.log(2) - self.epsilon) ** 2
