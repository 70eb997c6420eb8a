"""The same responses after two prompts in one stream: exactly what a plain forward per response gives, in log-probs and
gradients, whole, in pieces and in steps taken together."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from test_trainer import logs, run, weights, world  # noqa: F401
from tiny_models import Float64, V, furthest, plain, tiny
from torch import Tensor
from torch.testing import assert_close

from po.batch import Batch, Collate, Groups, Wanted
from po.coupled import Coupled
from po.data.rows import Example, Item
from po.forest import Group
from po.forward import Forward
from po.logprob import install
from po.objective import counted, objective, scope
from po.sharing import share
from po.spec import Term
from po.types import Head, HeadInput, HeadOutput, Needs

WANTED = Wanted(privileged=True)


@dataclass(frozen=True)
class Gap(Head):
    """The responses' log-probs against those after the privileged prompt, both trained, and against the step's mean."""

    needs: ClassVar[Needs] = Needs(layout="set", reward=True, privileged=True, couples_batch=True)
    student: bool = True

    def __call__(self, x: HeadInput) -> HeadOutput:
        gap_T = x.privileged_T * x.seg.spread(x.reward_GK)
        if self.student:
            gap_T = gap_T - x.policy_T
        gap_GK = x.seg.mean(gap_T)
        return HeadOutput((gap_GK - gap_GK.mean()).square().sum(-1))


def ids(rng: random.Random, most: int) -> tuple[int, ...]:
    return tuple(rng.randrange(3, V) for _ in range(rng.randint(1, most)))


def examples() -> list[Example]:
    rng = random.Random(1)
    out = []
    for i in range(4):
        responses = tuple(ids(rng, 6) for _ in range(1 + i % 3))
        rewards = tuple(rng.random() for _ in responses)
        logps = tuple(tuple(-float(t) for t in r) for r in responses)
        out.append(Example(f"r{i}", f"w{i}", ids(rng, 9), responses, rewards, logps=logps, privileged_ids=ids(rng, 12)))
    return out


ROWS = examples()
DATA = Groups(ROWS, [Item(0, (0,)), Item(1, (1, 0)), Item(2, (0, 2)), Item(3, (0,))])


def groups(at: Sequence[int], privileged: bool) -> list[Group]:
    return [
        (e.privileged_ids or () if privileged else e.prompt_ids, [e.response_ids[k] for k in DATA.items[i].responses])
        for i in at
        for e in [ROWS[i]]
    ]


def collated(at: Sequence[int], **options: Any) -> Batch:
    return Collate(wanted=WANTED, **options)([DATA[i, True] for i in at])


@pytest.fixture(scope="module")
def net() -> Any:
    return tiny("llama")


@pytest.fixture(scope="module")
def model() -> Any:
    shared = tiny("llama")
    install(shared)
    share(shared)
    return shared


def input_of(model: Any, batch: Batch) -> HeadInput:
    return Forward([Term(Gap())], None)(model, batch).x


@pytest.mark.parametrize("shared", [True, False])
def test_both_are_one_plain_forward_per_response(net: Any, model: Any, shared: bool) -> None:
    batch = collated(range(4), share_prefix=shared)
    with Float64():
        x = input_of(model, batch)
        for got, privileged in ((x.policy_T, False), (x.privileged_T, True)):
            assert_close(got, plain(net, groups(range(4), privileged)), rtol=0, atol=1e-12)
    assert (x.policy_T - x.privileged_T).abs().max() > 0.1
    alone = Collate()([DATA[i, True] for i in range(4)])
    assert torch.equal(x.seg.slot_T, alone.seg.slot_T)
    assert torch.equal(x.seg.valid_GK, alone.seg.valid_GK)
    assert alone.old_T is not None
    assert torch.equal(x.old_T, alone.old_T)


def test_what_is_per_token_stays_with_the_own_tokens() -> None:
    seen: list[tuple[Any, Any]] = []

    def look(prompt: Any, response: Any) -> list[float]:
        seen.append((prompt, response))
        return [float(t) for t in response]

    rows = [
        replace(
            e,
            teacher_ids=tuple(tuple((t, t + 1) for t in r) for r in e.response_ids),
            teacher_logps=tuple(tuple((-1.0, -2.0) for _ in r) for r in e.response_ids),
            token_columns=(("twice", tuple(tuple(2.0 * t for t in r) for r in e.response_ids)),),
        )
        for e in ROWS
    ]
    data = Groups(rows, DATA.items)
    batch = Collate(wanted=replace(WANTED, teacher=True, token_columns=("twice",)), reference=look)(
        [data[i, i < 3] for i in range(4)]
    )
    T = batch.stream.target_T.numel()
    for x_T in (batch.ref_T, batch.old_T, batch.candidate_ids_TM, batch.teacher_TM, batch.token_columns["twice"]):
        assert x_T is not None
        assert len(x_T) == T
    assert {p for p, _ in seen} == {e.prompt_ids for e in ROWS}
    own = batch.own(batch.stream.target_T)
    assert batch.privileged_T is not None
    assert torch.equal(own, batch.stream.target_T[batch.privileged_T])
    x = batch.head_input(torch.zeros(T), batch.ref_T)
    assert torch.equal(x.ref_T, own.float())
    assert torch.equal(x.old_T, -own.float())
    assert torch.equal(x.token_column_T("twice"), 2 * own.float())
    assert x.teacher_TM.unique().tolist() == [-2, -1]
    assert x.seg.valid_GK.tolist() == [[True, False], [True, True], [True, True], [False, False]]
    assert batch.head_input(torch.empty(0), None).seg.valid_GK.sum() == 5
    assert batch.to("meta").privileged_T.device.type == "meta"  # type: ignore[union-attr]


def gradient(model: Any) -> list[Tensor]:
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


@pytest.mark.parametrize("head", [Gap(), Gap(student=False)])
@pytest.mark.parametrize(
    ("split", "tokens"),
    [([[0, 1, 2, 3]], None), ([[0, 1], [2], [3]], None), ([[0, 1], [2, 3]], 14), ([[0, 1, 2, 3]], 1)],
)
def test_no_split_changes_the_gradient(net: Any, model: Any, head: Gap, split: list[list[int]], tokens: Any) -> None:
    counts = {scope(head.needs): 4.0}
    with Float64():
        batch = collated(range(4))
        x = batch.head_input(torch.empty(0), None)
        assert int(counted(x, scope(head.needs)).sum()) == 4
        both = torch.cat([plain(net, groups(range(4), p)) for p in (False, True)])
        loss = objective([Term(head)], batch.head_input(both, None), counts).loss
        loss.backward()
        want = gradient(net)
        step = Coupled(
            [Term(head)], 4, torch.device("cpu"), Forward([Term(head)], None), lambda _: None, tokens is not None
        )
        total = torch.zeros(())
        for one in step.begin([collated(at, max_tokens=tokens) for at in split]):
            work = step.work(model, one, counts)
            assert tokens is None or len(work.parts) == len(one.pieces) > 1
            for part in work.parts:
                value = part()
                value.backward()
                total = total + value.detach()
        assert_close(total.double(), loss.detach().double(), rtol=0, atol=1e-6)
        assert furthest(gradient(model), want) < 1e-9 * max(float(g.abs().max()) for g in want) + 1e-9


SPLITS: dict[str, dict[str, Any]] = {
    "whole": {},
    "micro-batches": {"train": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}},
    "pieces": {"max_tokens_per_forward": 12},
    "unshared": {"share_prefix": False},
}


@pytest.mark.parametrize("kind", ["cached", "adapter_off"])
def test_training_is_the_same_however_it_is_split(world: Path, kind: str) -> None:  # noqa: F811
    """Beside a head that reads a reference: from a cache, and computed over the whole stream."""
    rng = random.Random(3)
    words = [" ".join(f"w{rng.randrange(60)}" for _ in range(rng.randint(2, 6))) for _ in range(32)]
    rows = [
        {"prompt": f"{a} ", "privileged_prompt": f"{b} {a} ", "chosen": c, "rejected": d}
        for a, b, c, d in zip(*[iter(words)] * 4, strict=True)
    ]
    path = world / "knowing.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    outs = []
    for name, changes in SPLITS.items():
        model = {"name_or_path": str(world / "model"), "dtype": "float32"}
        share_prefix = changes.get("share_prefix", "auto")
        outs.append(
            run(
                world,
                f"knowing-{kind}-{name}",
                **{k: v for k, v in changes.items() if k not in ("train", "share_prefix")},
                model=model | {"share_prefix": share_prefix},
                train={"optim": "sgd", "per_device_train_batch_size": 4} | changes.get("train", {}),
                data={"train": str(path), "cache_dir": str(world / "cache")},
                reference={"from": "init", "kind": kind, "cache_dir": str(world / "cache")},
                loss=[{"head": "dpo", "beta": 0.5}, {"head": "hindsight", "weight": 0.5}],
            )
        )
    for out in outs:
        assert (weights(out) - weights(outs[0])).abs().max() < 5e-6
        for a, b in zip(logs(out), logs(outs[0]), strict=True):
            for metric in ("loss", "grad_norm", "hindsight/signal", "logps/chosen"):
                assert a.get(metric) == pytest.approx(b.get(metric), abs=1e-4), metric
    assert weights(outs[0]).abs().max() > 1e-4
    assert abs(logs(outs[0])[0]["hindsight/signal"]) > 1e-4
