"""Heads that couple the groups of an optimizer step: no split of the step changes what they see or do."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pytest
import torch
from annotated_types import Gt
from heads_support import F64, change, random_input
from safetensors.torch import load_file
from test_trainer import logs, run, weights, world  # noqa: F401
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.testing import assert_close

from po.numeric import masked_mean
from po.objective import counted, objective, scope
from po.spec import Term
from po.types import Head, HeadInput, HeadOutput, Needs
from po.whole import for_other_rows, join, signals, whole


@dataclass(frozen=True)
class Centred(Head):
    """DPO against the mean margin of the step, a running mean of it, and how often each row was seen."""

    needs: ClassVar[Needs] = Needs(layout="pair", reference=True, row=True, couples_batch=True)
    beta: Annotated[float, Gt(0)] = 0.5

    def __call__(self, x: HeadInput) -> HeadOutput:
        here_G = x.seg.valid_GK.any(-1)
        margin_G = self.beta * (x.logratio_GK[:, 0] - x.logratio_GK[:, 1])
        mean = masked_mean(margin_G, here_G)
        seen = x.state["seen"].index_add(0, x.row_G.clamp(min=0), here_G.double())
        return HeadOutput(-logsigmoid(margin_G - mean / 2), state={"mean": mean.detach(), "seen": seen})

    def state(self, rows: int) -> dict[str, Tensor]:
        return {"mean": torch.zeros((), dtype=F64), "seen": torch.zeros(rows, dtype=F64)}


def inputs(head: Head, *lengths: list[list[int]]) -> list[HeadInput]:
    found, row = [], 0
    for seed, part in enumerate(lengths):
        x = random_input(head, part, seed=seed)
        found.append(change(x, row=torch.arange(row, row + len(part))))
        row += len(part)
    return found


def test_a_step_taken_together_has_the_gradient_of_one_batch() -> None:
    head = Centred()
    parts = inputs(head, [[3, 5], [1, 2]], [[4, 1]], [[1, 1], [2, 2], [3, 1]])
    over = scope(head.needs)
    together = join(parts)
    counts = {over: float(counted(together, over).sum())}
    policy_T = together.policy_T.detach().requires_grad_(True)
    states = [head.state(6)]
    want = objective([Term(head)], change(together, policy_T=policy_T), counts, states)
    (grad_T,) = torch.autograd.grad(want.loss, policy_T)
    step = whole([Term(head)], parts, counts, states)
    shares = [share.loss(signals(x), world=1) for share, x in zip(step.shares, parts, strict=True)]
    mine = torch.cat([torch.autograd.grad(loss, x.policy_T)[0] for loss, x in zip(shares, parts, strict=True)])
    assert_close(mine, grad_T, rtol=0, atol=1e-15)
    assert_close(torch.stack(shares).sum().detach(), want.loss.detach())
    assert step.parts.outputs[0].state["seen"].tolist() == [1.0] * 6


def test_joining_keeps_ragged_groups_apart() -> None:
    needs = Needs(layout="set", reference=True, reward=True, teacher=True, columns=("value",))
    a, b = random_input(needs, [[2, 1], [3]], seed=1), random_input(needs, [[1, 2, 1, 4]], seed=2)
    b = change(b, teacher=torch.cat([b.teacher_TM, b.teacher_TM], 1))
    x = join([a, b])
    assert x.seg.valid_GK.tolist() == [[True, True, False, False], [True, False, False, False], [True] * 4]
    assert_close(x.logratio_GK[:2, :2], a.logratio_GK)
    assert_close(x.logratio_GK[2:], b.logratio_GK)
    assert_close(x.reward_GK[2], b.reward_GK[0])
    assert x.teacher_TM[: a.policy_T.numel(), 3:].isneginf().all()
    assert_close(x.column_G("value"), torch.cat([a.column_G("value"), b.column_G("value")]))


def test_evaluation_rows_have_rows_of_their_own() -> None:
    head = Centred()
    state = {"mean": torch.tensor(2.0), "seen": torch.ones(7)}
    other = for_other_rows(Term(head), state, rows=3)
    assert other["mean"] == 2.0
    assert other["seen"].tolist() == [0.0, 0.0, 0.0]


SPLITS = {"4x1": (4, 1, None), "1x4": (1, 4, None), "2x2": (2, 2, None), "4x1 in pieces": (4, 1, 30)}


def trained(world: Path, name: str, loss: list[dict[str, Any]], split: str, **changes: Any) -> Path:  # noqa: F811
    per_device, accumulation, tokens = SPLITS[split]
    train = {"per_device_train_batch_size": per_device, "gradient_accumulation_steps": accumulation, "optim": "sgd"}
    changes |= {"max_tokens_per_forward": tokens} if tokens else {}
    return run(world, f"{name}-{split.replace(' ', '-')}", loss=loss, train=train, **changes)


def same(out: Path, first: Path) -> None:
    assert weights(first).abs().max() > 1e-4
    assert_close(weights(out), weights(first), rtol=0, atol=5e-6)
    for a, b in zip(logs(out), logs(first), strict=True):
        for name in ("loss", "rewards/margins", "logps/chosen", "grad_norm", "entropy"):
            assert a.get(name) == pytest.approx(b.get(name), abs=1e-4), name


@pytest.mark.parametrize("head", ["aqfl", pytest.param("aot", marks=pytest.mark.slow)])
def test_no_split_changes_what_a_coupled_head_trains(world: Path, head: str) -> None:  # noqa: F811
    outs = [trained(world, head, [{"head": head, "beta": 0.5}], split) for split in SPLITS]
    for out in outs[1:]:
        same(out, outs[0])


def test_sets_in_pieces_train_as_whole_ones(world: Path) -> None:  # noqa: F811
    """Any head; a limit so small that every response has a forward of its own."""
    data = {"train": str(world / "sets.jsonl"), "cache_dir": str(world / "cache")}
    loss = [{"head": "infonca", "beta": 0.5, "alpha": 2.0}, {"head": "sft", "weight": 0.1}]
    whole_ = run(world, "sets-whole", loss=loss, data=data, train={"optim": "sgd"})
    parts = run(world, "sets-parts", loss=loss, data=data, train={"optim": "sgd"}, max_tokens_per_forward=2)
    same(parts, whole_)


def test_state_is_that_of_the_steps_and_survives_a_resume(world: Path) -> None:  # noqa: F811
    """Feasible Learning's multipliers per row: two epochs at once, and stopped after the first."""
    loss = [{"head": "feasible_dpo", "beta": 0.5}]
    train = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 4}
    once = run(world, "feasible", loss=loss, train=train)
    states = torch.cat([t.flatten() for t in load_file(once / "checkpoint-12" / "head_state.safetensors").values()])
    assert states.numel() >= 21
    assert states.std() > 0
    half = world / "feasible-half"
    half.mkdir()
    shutil.copytree(once / "checkpoint-6", half / "checkpoint-6")
    again = run(world, "feasible-half", loss=loss, train=train, resume=True)
    assert_close(weights(again), weights(once), rtol=0, atol=0)
    assert logs(again)[-2]["loss"] == logs(once)[-2]["loss"]
