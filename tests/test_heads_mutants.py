"""The contract can fail: heads with the bugs of public code, each rejected by the promise that it breaks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import pytest
import torch
from annotated_types import Gt
from heads_contract import CHECKS
from heads_support import random_input
from torch import Tensor
from torch.nn.functional import logsigmoid

from po.heads.dpo import DPO
from po.numeric import masked_log_softmax, masked_softmax
from po.types import Head, HeadInput, HeadOutput, Needs

PAIR = Needs(layout="pair", reference=True)
SET = Needs(layout="set", reference=True, reward=True)
BROKEN_BY: dict[type[Head], str] = {}


def breaks(promise: str):
    def note(cls):
        BROKEN_BY[cls] = promise
        return cls

    return note


def margin(x: HeadInput) -> torch.Tensor:
    chosen_G, rejected_G = x.logratio_GK.unbind(-1)
    return chosen_G - rejected_G


@breaks("loss_and_gradient_are_finite")
@dataclass(frozen=True)
class MaskFromValues(Head):
    """Counts the tokens with a non-zero log-ratio: 0/0 at policy == reference (HALOs' IPO)."""

    needs: ClassVar[Needs] = PAIR

    def __call__(self, x: HeadInput) -> HeadOutput:
        count_GK = x.seg.sum((x.logratio_T != 0).to(x.policy_T.dtype))
        chosen_G, rejected_G = (x.logratio_GK / count_GK).unbind(-1)
        return HeadOutput((chosen_G - rejected_G - 5) ** 2)


@breaks("a_group_ignores_its_neighbours")
@dataclass(frozen=True)
class BatchMean(Head):
    """Averages over its micro-batch: the gradient accumulation bug."""

    needs: ClassVar[Needs] = PAIR

    def __call__(self, x: HeadInput) -> HeadOutput:
        return HeadOutput(-logsigmoid(margin(x)).mean().expand(x.seg.valid_GK.shape[0]))


@breaks("a_group_ignores_its_neighbours")
@dataclass(frozen=True)
class LocalTokenCount(Head):
    """Divides by the tokens of its own micro-batch."""

    needs: ClassVar[Needs] = Needs(layout="best", unit="token")

    def __call__(self, x: HeadInput) -> HeadOutput:
        return HeadOutput(-x.policy_T / x.policy_T.numel())


@breaks("a_group_ignores_its_neighbours")
@dataclass(frozen=True)
class WhitenedRewards(Head):
    """Standardises rewards over the micro-batch."""

    needs: ClassVar[Needs] = SET

    def __call__(self, x: HeadInput) -> HeadOutput:
        valid_GK = x.seg.valid_GK
        mean = torch.where(valid_GK, x.reward_GK, 0).sum() / valid_GK.sum()
        weight_GK = torch.where(valid_GK, x.reward_GK - mean, 0)
        return HeadOutput(-(weight_GK * x.logratio_GK).sum(-1))


@breaks("never_waits_for_the_device")
@dataclass(frozen=True)
class Item(Head):
    """Reads a number on the host in every step."""

    needs: ClassVar[Needs] = PAIR

    def __call__(self, x: HeadInput) -> HeadOutput:
        return HeadOutput(-logsigmoid(margin(x)), {"item/margin": margin(x).detach() * 0 + margin(x).mean().item()})


@breaks("never_waits_for_the_device")
@dataclass(frozen=True)
class DataDependentShape(Head):
    """Indexes with a mask: the shape waits for the device."""

    needs: ClassVar[Needs] = SET

    def __call__(self, x: HeadInput) -> HeadOutput:
        kept = x.logratio_GK[x.seg.valid_GK].mean() * 0
        return HeadOutput(-masked_log_softmax(x.logratio_GK, x.seg.valid_GK).sum(-1) + kept)


@breaks("gradient_is_the_derivative_unless_declared")
@dataclass(frozen=True)
class SilentDetach(Head):
    needs: ClassVar[Needs] = PAIR

    def __call__(self, x: HeadInput) -> HeadOutput:
        chosen_G, rejected_G = x.logratio_GK.unbind(-1)
        return HeadOutput(-logsigmoid(chosen_G - rejected_G.detach()))


@breaks("gradient_is_the_derivative_unless_declared")
@dataclass(frozen=True)
class DetachThatIsNotThere(Head):
    needs: ClassVar[Needs] = Needs(layout="pair", reference=True, stops_gradient=True)

    def __call__(self, x: HeadInput) -> HeadOutput:
        return HeadOutput(-logsigmoid(margin(x)))


@breaks("the_unit_is_the_shape")
@dataclass(frozen=True)
class WrongUnit(Head):
    """Adds a token-level regulariser to a pair-level loss (HALOs' SLiC)."""

    needs: ClassVar[Needs] = PAIR

    def __call__(self, x: HeadInput) -> HeadOutput:
        return HeadOutput((1 - margin(x)).relu()[:, None] - 0.1 * x.policy_T[None])


@breaks("the_unit_is_the_shape")
@dataclass(frozen=True)
class MetricHoldsTheGraph(Head):
    needs: ClassVar[Needs] = PAIR

    def __call__(self, x: HeadInput) -> HeadOutput:
        return HeadOutput(-logsigmoid(margin(x)), {"metric/margin": margin(x)})


@breaks("reads_what_it_declares")
@dataclass(frozen=True)
class AsksForMore(Head):
    """Declares a reward that it never reads, and so turns plain pairs away."""

    needs: ClassVar[Needs] = Needs(layout="pair", reference=True, reward=True)

    def __call__(self, x: HeadInput) -> HeadOutput:
        return HeadOutput(-logsigmoid(margin(x)))


@breaks("loss_and_gradient_are_finite")
@dataclass(frozen=True)
class ReadsUndeclared(Head):
    needs: ClassVar[Needs] = Needs(layout="pair")

    def __call__(self, x: HeadInput) -> HeadOutput:
        return HeadOutput(-logsigmoid(margin(x)))


@breaks("empty_places_change_nothing")
@dataclass(frozen=True)
class UnmaskedSoftmax(Head):
    needs: ClassVar[Needs] = SET

    def __call__(self, x: HeadInput) -> HeadOutput:
        target_GK = x.reward_GK.nan_to_num(0).softmax(-1)
        return HeadOutput(-(target_GK * masked_log_softmax(x.logratio_GK, x.seg.valid_GK)).sum(-1))


@breaks("empty_places_change_nothing")
@dataclass(frozen=True)
class WidthForCount(Head):
    """Divides by the width of the grid instead of the group's own number of responses."""

    needs: ClassVar[Needs] = SET

    def __call__(self, x: HeadInput) -> HeadOutput:
        target_GK = masked_softmax(x.reward_GK, x.seg.valid_GK)
        uniform_GK = x.seg.valid_GK / x.seg.valid_GK.shape[-1]
        both_GK = target_GK * logsigmoid(x.logratio_GK) + uniform_GK * logsigmoid(-x.logratio_GK)
        return HeadOutput(-both_GK.sum(-1))


@breaks("empty_places_change_nothing")
@dataclass(frozen=True)
class MasksByMultiplying(Head):
    """0 * NaN is NaN."""

    needs: ClassVar[Needs] = SET

    def __call__(self, x: HeadInput) -> HeadOutput:
        return HeadOutput(-(x.reward_GK * x.seg.valid_GK * x.logratio_GK).sum(-1))


@breaks("extreme_inputs_stay_finite")
@dataclass(frozen=True)
class LogOfSigmoid(Head):
    needs: ClassVar[Needs] = PAIR

    def __call__(self, x: HeadInput) -> HeadOutput:
        return HeadOutput(-margin(x).sigmoid().log())


@breaks("extreme_inputs_stay_finite")
@dataclass(frozen=True)
class StandardisesEqualRewards(Head):
    """The standard deviation of equal rewards is 0, and that of one response is NaN."""

    needs: ClassVar[Needs] = SET

    def __call__(self, x: HeadInput) -> HeadOutput:
        n_G1 = x.seg.valid_GK.sum(-1, keepdim=True)
        r_GK = torch.where(x.seg.valid_GK, x.reward_GK, 0)
        d_GK = torch.where(x.seg.valid_GK, r_GK - r_GK.sum(-1, keepdim=True) / n_G1, 0)
        return HeadOutput(-(d_GK / d_GK.square().sum(-1, keepdim=True).sqrt() * x.logratio_GK).sum(-1))


@breaks("only_logratios_matter_unless_declared")
@dataclass(frozen=True)
class ForgetsOneReference(Head):
    needs: ClassVar[Needs] = PAIR

    def __call__(self, x: HeadInput) -> HeadOutput:
        chosen_G, _ = x.logratio_GK.unbind(-1)
        _, rejected_G = x.seg.sum(x.policy_T).unbind(-1)
        return HeadOutput(-logsigmoid(0.1 * (chosen_G - rejected_G)))


@breaks("start_is_the_loss_at_policy_equals_reference")
@dataclass(frozen=True)
class WrongStart(Head):
    needs: ClassVar[Needs] = SET

    def __call__(self, x: HeadInput) -> HeadOutput:
        target_GK = masked_softmax(x.reward_GK, x.seg.valid_GK)
        return HeadOutput(-(target_GK * masked_log_softmax(x.logratio_GK, x.seg.valid_GK)).sum(-1))

    def start(self, K: int) -> float:
        return math.log(2)


@breaks("start_is_the_loss_at_policy_equals_reference")
@dataclass(frozen=True)
class NoStart(Head):
    needs: ClassVar[Needs] = PAIR

    def __call__(self, x: HeadInput) -> HeadOutput:
        return HeadOutput(-logsigmoid(margin(x)))


@breaks("precision_does_not_decide")
@dataclass(frozen=True)
class Cancels(Head):
    """A difference of large numbers: exact in float64, nothing left in fp32."""

    needs: ClassVar[Needs] = PAIR

    def __call__(self, x: HeadInput) -> HeadOutput:
        return HeadOutput(-logsigmoid((margin(x) + 1e6) - 1e6))


@breaks("gradient_is_the_derivative_unless_declared")
@dataclass(frozen=True)
class SmallPrecision(Head):
    needs: ClassVar[Needs] = PAIR

    def __call__(self, x: HeadInput) -> HeadOutput:
        return HeadOutput(-logsigmoid(margin(x).bfloat16()).to(x.policy_T.dtype))


@breaks("is_pure")
@dataclass(frozen=True)
class ShiftsItsReference(Head):
    needs: ClassVar[Needs] = PAIR

    def __call__(self, x: HeadInput) -> HeadOutput:
        loss_G = -logsigmoid(margin(x))
        x.ref_T.add_(1e-3)
        return HeadOutput(loss_G)


@breaks("is_pure")
@dataclass(frozen=True)
class Dropout(Head):
    needs: ClassVar[Needs] = PAIR

    def __call__(self, x: HeadInput) -> HeadOutput:
        return HeadOutput(-logsigmoid(torch.dropout(margin(x), 0.5, True)))


@breaks("is_a_frozen_dataclass_derived_from_head")
@dataclass(frozen=True)
class HeadOfAHead(DPO):
    """A second level of inheritance."""


@breaks("fields_have_a_range")
@dataclass(frozen=True)
class NoRange(Head):
    needs: ClassVar[Needs] = PAIR
    beta: float = 0.1

    def __call__(self, x: HeadInput) -> HeadOutput:
        return HeadOutput(-logsigmoid(self.beta * margin(x)))


@breaks("is_documented")
@dataclass(frozen=True)
class Undocumented(Head):
    needs: ClassVar[Needs] = PAIR
    zeta: Annotated[float, Gt(0)] = 0.1

    def __call__(self, x: HeadInput) -> HeadOutput:
        return HeadOutput(-logsigmoid(self.zeta * margin(x)))


@breaks("reads_only_types_and_numeric")
@dataclass(frozen=True)
class Reaches(Head):
    """Built on another head (this file imports po.heads.dpo)."""

    needs: ClassVar[Needs] = PAIR

    def __call__(self, x: HeadInput) -> HeadOutput:
        return DPO()(x)


@breaks("state_is_declared_and_kept")
@dataclass(frozen=True)
class FillersCount(Head):
    """A running mean that takes the groups that hold nothing along."""

    needs: ClassVar[Needs] = Needs(layout="pair", reference=True, couples_batch=True, stops_gradient=True)

    def __call__(self, x: HeadInput) -> HeadOutput:
        shift = 0.9 * x.state["mean"] + 0.1 * margin(x).detach().mean()
        return HeadOutput(-logsigmoid(margin(x) - shift), state={"mean": shift})

    def state(self, rows: int) -> dict[str, Tensor]:
        return {"mean": torch.zeros(())}


@pytest.mark.parametrize("mutant", BROKEN_BY, ids=lambda cls: cls.__name__)
def test_the_contract_rejects(mutant: type[Head]) -> None:
    if mutant is not ReadsUndeclared:
        mutant()(random_input(mutant()))  # it runs: what rejects it is the promise, not a slip of this file
    with pytest.raises((Exception, pytest.fail.Exception)):  # an assertion, or the mutant's own crash
        CHECKS[BROKEN_BY[mutant]](mutant())


def test_every_promise_has_a_mutant_that_breaks_it() -> None:
    assert set(BROKEN_BY.values()) == set(CHECKS)
