"""Every head through the whole road: rows, packing, reference, training. By kind of Needs; all of them with -m slow."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import logs, weights
from tiny import WORDS, make_model, write_recipe

from po.heads import HEADS
from po.recipe import load
from po.run import train
from po.types import Needs

WORD_ID = {w: i + 3 for i, w in enumerate(WORDS)}  # as make_model numbers them


def kind(needs: Needs) -> tuple[Any, ...]:
    """Heads of one kind meet the same code outside of their own file."""
    flags = ("label", "token_kl", "collision", "differs", "teacher", "prompt_embedding", "mismatch", "couples_batch")
    flags += ("privileged",)
    named = (needs.columns, (*needs.response_columns, *needs.token_columns))
    return needs.layout, needs.hidden, *map(bool, named), *(getattr(needs, f) for f in flags)


def one_of_each_kind() -> list[str]:
    return list({kind(cls.needs): name for name, cls in HEADS.items()}.values())


def response(rng: random.Random, needs: Needs, label: int, k: int) -> dict[str, Any]:
    words = [WORDS[k], *rng.choices(WORDS, k=rng.randint(0, 4))]
    made: dict[str, Any] = {"content": " ".join(words)}
    if needs.reward or needs.layout == "set":
        made["reward"] = rng.random() - 0.5  # either sign: nft reads no more
    if needs.label or needs.layout in ("unpaired", "labelled"):
        made["label"] = {1: True, -1: False, 0: None}[label]
    tokens = [WORD_ID[w] for w in words] + [2]
    if needs.behaviour:
        made["logps"] = [-2.0 - rng.random() for _ in tokens]
    if needs.embedding:
        made["embedding"] = [rng.gauss(0, 1) for _ in range(3)]
    made |= {name: float(rng.random() < 0.5) for name in needs.response_columns}
    made |= {name: [float(rng.random() < 0.5) for _ in tokens] for name in needs.token_columns}
    if needs.teacher:
        ids = [rng.sample(range(63), 4) for _ in tokens]
        logps = [[-1.0 - rng.random() for _ in range(4)] for _ in tokens]
        made["teacher"] = {"ids": ids, "logps": logps, "ref_logps": [[p - 0.3 for p in row] for row in logps]}
    return made


def row(i: int, needs: Needs, K: int | None = None) -> dict[str, Any]:
    rng = random.Random(i)
    labels = {"pair": (1, -1), "set": (1, -1, 1), "best": (1, -1), "unpaired": ((-1) ** i,), "labelled": (1, -1, 0, 1)}
    made: dict[str, Any] = {"prompt": " ".join(rng.choices(WORDS, k=rng.randint(2, 6))) + " "}
    made |= {name: rng.random() for name in needs.columns}
    if needs.prompt_embedding:
        made["prompt_embedding"] = [rng.gauss(0, 1) for _ in range(3)]
    if needs.privileged:
        made["privileged_prompt"] = f"{rng.choice(WORDS)} {made['prompt']}"
    responses = [response(rng, needs, label, k) for k, label in enumerate(labels[needs.layout][:K])]
    if needs.layout in ("pair", "best") and not needs.reward:
        for k, r in enumerate(responses):
            r |= {"reward": 1.0 - k}
            r.pop("label", None)
    return made | {"responses": responses}


def trains(folder: Path, name: str, **changes: Any) -> Path:
    needs = HEADS[name].needs
    make_model(folder / "model")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row(i, needs, SIZES.get(name))) + "\n" for i in range(12)))
    reference = {"from": "init" if needs.any_reference else "none", "kind": "adapter_off"}
    recipe = write_recipe(
        folder / "r.yaml",
        folder / "model",
        folder / "rows.jsonl",
        folder / "out",
        loss=[{"head": name, **SETTINGS.get(name, {})}],
        reference=reference if needs.any_reference else "none",
        **changes,
    )
    train(*load(recipe))
    return folder / "out"


SIZES = {"grpo2": 2}  # responses of a row, where not any number will do
SETTINGS: dict[str, dict[str, Any]] = {"prob_sft_threshold": {"threshold": 1e-3}}  # an untrained model knows nothing


def check_head(folder: Path, name: str) -> None:
    out = trains(folder, name, train={"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2})
    first = logs(out)[0]
    head = HEADS[name]()
    start = head.start({"pair": 2, "unpaired": 1, "set": 3}.get(head.needs.layout, 4))
    assert all(torch.isfinite(torch.tensor(v)) for v in first.values() if isinstance(v, float))
    if start is not None and not head.needs.behaviour:  # these rows were not sampled by this policy
        assert first["loss"] == pytest.approx(start, abs=1e-3)
    assert first["grad_norm"] > 0
    assert weights(out).abs().max() > 0


@pytest.mark.parametrize("name", one_of_each_kind())
def test_a_head_of_each_kind_trains(tmp_path: Path, name: str) -> None:
    check_head(tmp_path, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(HEADS) - set(one_of_each_kind())))
def test_every_other_head_trains(tmp_path: Path, name: str) -> None:
    check_head(tmp_path, name)
