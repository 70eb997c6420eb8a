"""The one place that averages: micro-batches add up, each head over its own units, wrong shapes refused."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from heads_support import F64, change, grid, input_from_logratios, random_input, segments, tensors
from torch import Tensor
from torch.testing import assert_close

from po.heads.dpo import DPO
from po.heads.infonca import InfoNCA
from po.heads.mpo_multi import MPOMulti
from po.heads.nca import NCA
from po.heads.sft import SFT
from po.objective import Scope, counted, objective, scope
from po.spec import Term
from po.types import Head, HeadInput, HeadOutput, Needs, Segments

LENGTHS = ((3, 1, 4, 2), (2, 5), (1, 1, 1), (6, 2), (2, 2, 2, 9))
MIXES = {
    "group": [Term(InfoNCA(beta=0.5))],
    "token, best": [Term(SFT())],
    "sets and sft": [Term(NCA(beta=0.5), 0.7), Term(MPOMulti(), 2.0), Term(SFT(), 0.3)],
}
SPLITS = [[[0, 1, 2, 3, 4]], [[0], [1], [2], [3], [4]], [[4, 0], [2], [3, 1]], [[1, 2, 3, 4], [], [0]]]


def take(x: HeadInput, groups: list[int]) -> HeadInput:
    """Some groups as a micro-batch, padded with one empty group, as a rank without data has it."""
    K = x.seg.valid_GK.shape[1]
    of_T = x.seg.slot_T // K
    keep = torch.cat([torch.nonzero(of_T == g).flatten() for g in groups] or [torch.zeros(0, dtype=torch.int64)])
    place = {g: i for i, g in enumerate(groups)}
    slot = [place[int(g)] * K + int(s) % K for g, s in zip(of_T[keep], x.seg.slot_T[keep], strict=True)]
    rows = torch.tensor([*groups, 0])
    valid_GK = x.seg.valid_GK[rows]
    valid_GK[-1] = False
    cut = {k: t[keep] if k in ("policy_T", "ref") else t[rows] for k, t in tensors(x).items()}
    return change(x, seg=Segments(torch.tensor(slot, dtype=torch.int64), valid_GK), **cut)


def counts(terms: list[Term], xs: list[HeadInput]) -> dict[Scope, float]:
    over = {scope(t.head.needs) for t in terms}
    return {s: float(sum(int(counted(x, s).sum()) for x in xs)) for s in over}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_micro_batches_add_up_to_the_step(mix: str, split: list[list[int]]) -> None:
    terms, x = MIXES[mix], random_input(InfoNCA.needs, LENGTHS)
    whole = objective(terms, x, counts(terms, [x])).loss
    micro = [take(x, groups) for groups in split]
    total = counts(terms, micro)
    assert total == counts(terms, [x])
    shares = torch.stack([objective(terms, m, total).loss for m in micro])
    assert_close(shares.sum(), whole)
    assert_close(torch.autograd.grad(shares.sum(), x.policy_T), torch.autograd.grad(whole, x.policy_T))


def test_units_of_each_scope() -> None:
    """Two groups; the best responses are the second of the first group and the first of the second (a tie)."""
    x = change(input_from_logratios([[0, 0, 0], [0, 0]], lengths=[[1, 2, 1], [3, 2]]), reward=grid([[1, 3, 2], [5, 5]]))
    expected: dict[Scope, list[object]] = {
        ("group", False): [True, True],
        ("group", True): [True, True],
        ("response", False): [[True, True, True], [True, True, False]],
        ("response", True): [[False, True, False], [True, False, False]],
        ("token", False): [True] * 9,
        ("token", True): [False, True, True, False, True, True, True, False, False],
    }
    assert {over: counted(x, over).tolist() for over in expected} == expected


def test_without_rewards_the_first_response_is_the_best() -> None:
    x = input_from_logratios([[0.0, 0.0], [0.0, 0.0]])
    assert x.best_GK.tolist() == [[True, False], [True, False]]


@pytest.mark.parametrize("empty", [1e6, torch.nan, torch.inf])
def test_an_empty_place_is_never_the_best(empty: float) -> None:
    seg = segments([[1, 1, 1], [1]])
    x = HeadInput(seg, torch.zeros(4, dtype=F64), reward=grid([[1, 2, 3], [-4]], empty=empty))
    assert x.best_GK.tolist() == [[False, False, True], [True, False, False]]


def test_a_filler_group_has_no_best_response() -> None:
    x = take(random_input(SFT.needs, LENGTHS), [1])
    assert x.best_GK.tolist() == [[True, False, False, False], [False] * 4]
    assert counted(x, ("group", True)).tolist() == [True, False]


def test_dpo_with_sft_weighs_pairs_and_chosen_tokens() -> None:
    """0.5 * mean over pairs of DPO + 2 * mean over the tokens of the chosen responses of -log pi."""
    x = random_input(DPO.needs, ((3, 5), (1, 2)))
    terms = [Term(DPO(beta=0.3), 0.5), Term(SFT(), 2.0)]
    assert counts(terms, [x]) == {("group", False): 2.0, ("token", True): 4.0}
    got = objective(terms, x, counts(terms, [x]))
    chosen_T = torch.tensor([1, 1, 1, 0, 0, 0, 0, 0, 1, 0, 0], dtype=torch.bool)
    assert_close(got.loss, 0.5 * DPO(beta=0.3)(x).loss.mean() - 2 * x.policy_T[chosen_T].mean())
    assert got.masks[0].tolist() == [True, True]
    assert got.masks[1].tolist() == chosen_T.tolist()
    assert_close(got.outputs[0].loss, DPO(beta=0.3)(x).loss)
    (sft_T,) = torch.autograd.grad(objective(terms[1:], x, counts(terms, [x])).loss, x.policy_T)
    assert_close(sft_T, -2 * chosen_T.to(F64) / 4)


def test_a_step_without_units_is_zero_and_not_nan() -> None:
    x = take(random_input(InfoNCA.needs, LENGTHS), [])
    terms = MIXES["sets and sft"]
    assert objective(terms, x, counts(terms, [x])).loss.item() == 0


def test_units_that_do_not_count_have_no_gradient_even_when_their_loss_is_nan() -> None:
    @dataclass(frozen=True)
    class PerResponse(Head):
        needs: ClassVar[Needs] = Needs(layout="set", unit="response")

        def __call__(self, x: HeadInput) -> HeadOutput:
            return HeadOutput(torch.where(x.seg.valid_GK, -x.seg.sum(x.policy_T), torch.nan))

    x = random_input(PerResponse.needs, ((2, 1, 1), (3,)))
    loss = objective([Term(PerResponse())], x, {("response", False): 4.0}).loss
    assert_close(loss, -x.policy_T.sum() / 4)
    assert_close(torch.autograd.grad(loss, x.policy_T)[0], torch.full((7,), -0.25, dtype=F64))


@dataclass(frozen=True)
class Shaped(Head):
    """Returns what it is given, whatever it declares."""

    needs: ClassVar[Needs] = Needs(layout="pair")
    loss: Tensor

    def __call__(self, x: HeadInput) -> HeadOutput:
        return HeadOutput(self.loss)


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ((), "head Shaped declares unit='group', so its loss must have shape (3,); got ()"),
        ((3, 2), "head Shaped declares unit='group', so its loss must have shape (3,); got (3, 2)"),
        ((1,), "head Shaped declares unit='group', so its loss must have shape (3,); got (1,)"),
    ],
)
def test_a_loss_of_another_shape_is_refused(shape: tuple[int, ...], says: str) -> None:
    """Also those that would broadcast."""
    with pytest.raises(ValueError, match=f"^{re.escape(says)}$"):
        objective([Term(Shaped(torch.zeros(shape)))], random_input(Shaped.needs), {("group", False): 3.0})
