"""Plain policy gradient on answers that somebody else gave, as if the policy had just sampled them. Nobody should train
with it: it is here to be compared with, and only benchmarks know it as a head."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge

from po.heads import HEADS
from po.types import Head, HeadInput, HeadOutput, Needs

NAME = "plain_pg"


@dataclass(frozen=True)
class PlainPG(Head):
    """loss = -(R - beta log pi/ref(y) - b) log pi(y), the weight detached; b = 0, or the row's number `value`."""

    needs: ClassVar[Needs] = Needs(
        layout="set",
        unit="response",
        reference=True,
        reward=True,
        columns=("value",),
        raw_logps=True,
        stops_gradient=True,
    )

    beta: Annotated[float, Ge(0)] = 0.0
    baseline: Literal["none", "value"] = "none"

    def __call__(self, x: HeadInput) -> HeadOutput:
        weight_GK = x.reward_GK - self.beta * x.logratio_GK.detach()
        if self.baseline == "value":
            weight_GK = weight_GK - x.column_G("value")[:, None]
        return HeadOutput(-weight_GK * x.seg.sum(x.policy_T))


@contextlib.contextmanager
def known() -> Iterator[None]:
    """Within it recipes can say `head: plain_pg`."""
    HEADS[NAME] = PlainPG
    try:
        yield
    finally:
        del HEADS[NAME]
