"""Rows for every layout, made from the sandbox's scored sets: nothing here comes from outside the little world.

    scored     K answers with their rewards; po makes pairs of them (best against worst) or takes the best
    labelled   an answer is desirable if its reward is above the mean of its question's answers
    ends       the best answer is desirable, the worst undesirable, those between are unlabelled samples of the model
    few        as `ends`, but on every fourth question alone; the answers of the others are unlabelled
    degrees    best and worst labelled, and an unlabelled copy of the best with 1 to 3 quarters of its words struck out
    sampled    as `labelled`, with the base model's log-probs: it is who gave the answers
    taught     as `scored`, with the log-probs of a teacher (DPO on the same rows) and of its own reference

Rows also carry what single heads read: embeddings (how many things of each kind a question wants or an answer names,
and how many other words it has) and the columns below.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from harness.world import Row, World
from po.sandbox.questions import KINDS, wanted
from po.sandbox.sampling import Sample
from po.types import Needs

KIND_OF = {word: kind for kind, things in KINDS.items() for word in things}
OWN_KIND = {"hypo_kl": "ends", "selm": "ends", "sspo": "few", "spo_degree": "degrees"}
TOP = 8  # tokens that a teacher stores at each position


def kind_of_rows(name: str, needs: Needs) -> str:
    """Which of the derived files a head is trained on."""
    if name in OWN_KIND:
        return OWN_KIND[name]
    if needs.teacher:
        return "taught"
    if needs.behaviour:
        return "sampled"
    return "labelled" if needs.label or needs.layout in ("unpaired", "labelled") else "scored"


def rewards(row: Row) -> list[float]:
    return [a["reward"] for a in row["responses"]]


def consistency(row: Row) -> float:
    """How sure two noisy judges would agree on best and worst: a logistic curve of their distance, width 0.1."""
    return 1 / (1 + math.exp(-(max(rewards(row)) - min(rewards(row))) / 0.1))


def density_ratios(rows: Sequence[Row]) -> Callable[[Row], float]:
    """Desirable over undesirable answers among questions that ask for as many things, over the same of all rows."""
    good, bad = Counter[int](), Counter[int]()
    for row in rows:
        label = above_mean(row)
        good[_asked(row)] += sum(label)
        bad[_asked(row)] += len(label) - sum(label)
    odds = sum(good.values()) / sum(bad.values())
    return lambda row: max(good[_asked(row)], 1) / max(bad[_asked(row)], 1) / odds


def columns(rows: Sequence[Row]) -> dict[str, Callable[[int, Row], float]]:
    """What heads read from rows under a name of their own."""
    ratio = density_ratios(rows)
    return {
        "value": lambda i, row: sum(rewards(row)) / len(rewards(row)),  # A-LoL: what the base earns on the question
        "consistency": lambda i, row: consistency(row),  # CREAM
        "thinking": lambda i, row: i % 2,  # BVPO: every other row counts as one with a trace
        "density_ratio": lambda i, row: ratio(row),  # BCO with matching
        "removed": lambda i, row: 1 + i % 3,  # SPO: quarters of the copy's words that are gone
    }


COLUMNS = ("value", "consistency", "thinking", "density_ratio", "removed")


def above_mean(row: Row) -> list[bool]:
    mean = sum(rewards(row)) / len(rewards(row))
    return [r > mean for r in rewards(row)]


def _asked(row: Row) -> int:
    return sum(n for _, n in wanted(row["prompt"]))


def embed_prompt(row: Row) -> list[float]:
    asked = dict(wanted(row["prompt"]))
    return [float(asked.get(kind, 0)) for kind in KINDS] + [0.0]


def embed_answer(text: str) -> list[float]:
    named = Counter(KIND_OF.get(word, "") for word in re.findall(r"[^\s,.]+", text))
    return [float(named[kind]) for kind in KINDS] + [float(named[""])]


def derive(world: World, kind: str, path: Path, rows: Sequence[Row], teacher: Any = None) -> Path:
    """Write the rows of a kind, once. teacher: the model behind `taught`."""
    if not path.is_file():
        fill = columns(rows)
        known = [(i, row) for i, row in enumerate(rows) if len(set(rewards(row))) > 1]
        named = [{name: float(of(i, row)) for name, of in fill.items()} for i, row in known]
        write(path, [_row(world, kind, i, row, teacher) | more for (i, row), more in zip(known, named)])
    return path


def write(path: Path, rows: Sequence[Row]) -> Path:
    """JSON lines, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_suffix(".tmp")
    staged.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    staged.replace(path)
    return path


def _row(world: World, kind: str, i: int, row: Row, teacher: Any) -> dict[str, Any]:
    answers = [{**a, "embedding": embed_answer(a["content"])} for a in row["responses"]]
    order = sorted(range(len(answers)), key=lambda k: -answers[k]["reward"])
    if kind in ("labelled", "sampled"):
        answers = [{**a, "label": label} for a, label in zip(answers, above_mean(row))]
    elif kind in ("ends", "few"):
        known = kind == "ends" or i % 4 == 0
        label = {order[0]: True, order[-1]: False} if known else {}
        answers = [{**a, "label": label.get(k)} for k, a in enumerate(answers)]
    elif kind == "degrees":
        best, worst = answers[order[0]], answers[order[-1]]
        copy = {**best, "content": strike(best["content"], 1 + i % 3)}
        answers = [{**best, "label": True}, {**worst, "label": False}, {**copy, "label": None}]
    if kind == "sampled":
        answers = [{**a, "logps": _token_logps(world, world.encode(row["prompt"], a["content"]))} for a in answers]
    elif kind == "taught":
        answers = [{**a, "teacher": _teach(world, teacher, world.encode(row["prompt"], a["content"]))} for a in answers]
    return {**row, "responses": answers, "prompt_embedding": embed_prompt(row)}


def strike(text: str, quarters: int) -> str:
    """The text without so many quarters of its words, from the end; one word always stays."""
    words = text.split()
    return " ".join(words[: max(1, len(words) - len(words) * quarters // 4)]).rstrip(",.") + "."


@torch.no_grad()
def _predictions(model: Any, sample: Sample) -> torch.Tensor:
    """Log-probs over the vocabulary at each response token. (T, V)"""
    ids = torch.tensor([sample.prompt_ids + sample.response_ids])
    return model(input_ids=ids).logits[0, len(sample.prompt_ids) - 1 : -1].float().log_softmax(-1)


def _token_logps(world: World, sample: Sample) -> list[float]:
    found = _predictions(world.model, sample).gather(-1, torch.tensor(sample.response_ids)[:, None])[:, 0]
    return [min(0.0, x) for x in found.tolist()]


def _teach(world: World, teacher: Any, sample: Sample) -> dict[str, Any]:
    top = _predictions(teacher, sample).topk(TOP)
    own = _predictions(world.model, sample).gather(-1, top.indices)
    return {"ids": top.indices.tolist(), "logps": top.values.tolist(), "ref_logps": own.tolist()}
