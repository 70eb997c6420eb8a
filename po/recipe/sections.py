"""The sections of a recipe that every kind of training shares, from plain values to dataclasses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from po.recipe.arguments import check as check_train
from po.recipe.fields import MisfitError, fit, hints, parse, shown
from po.recipe.report import Report
from po.recipe.resolve import REDACTED
from po.recipe.text import Keys
from po.spec import DataSpec, LoraSpec, Recipe, Source

T = TypeVar("T")


def section(cls: type[T], said: Mapping[str, Any], key: str, report: Report) -> T | None:
    """A section that is a dataclass; None where the recipe has none, or something in it is wrong."""
    return None if said.get(key) is None else parse(cls, said[key], (key,), report)


def scalars(said: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """The keys of the top level that are no sections, where the recipe has them."""
    out: dict[str, Any] = {}
    for key in ("output_dir", "deepspeed", "max_tokens_per_forward", "resume", "seed"):
        if said.get(key) is not None:
            try:
                out[key] = fit(hints(Recipe)[key], said[key])
            except MisfitError as e:
                report.wrong((key,), str(e))
    return out


def lora_section(raw: Any, report: Report) -> LoraSpec | None:
    """`lora`, None without one."""
    if raw is True:
        report.wrong(("lora",), "expected a mapping, got true; write e.g. `lora: {r: 16, alpha: 32}`, or `lora: {}`.")
        return None
    return None if raw is None else parse(LoraSpec, raw, ("lora",), report)


def data_section(raw: Any, report: Report) -> DataSpec | None:
    """`data`, with its sources."""
    if not isinstance(raw, Mapping):
        return parse(DataSpec, raw, ("data",), report)
    sources = {}
    for split in ("train", "eval"):
        found = [parse(Source, s, ("data", split, i), report) for i, s in enumerate(raw.get(split) or [])]
        sources[split] = tuple(s for s in found if s is not None)
    if not raw.get("train"):
        report.wrong(
            ("data", "train"), "is missing; expected a file, a folder or a hub name, e.g. `train: pairs.jsonl`."
        )
    spec = parse(DataSpec, {**raw, **sources}, ("data",), report)
    return spec if spec is not None and spec.train else None


def train_section(raw: Any, report: Report) -> dict[str, Any]:
    """`train`, as far as it is right."""
    if raw is None:
        return {}
    if not isinstance(raw, Mapping):
        report.wrong(("train",), f"expected a mapping, e.g. {{learning_rate: 1e-6}}, got {shown(raw)}")
        return {}
    return check_train(raw, report)


def find_redacted(node: Any, at: Keys, report: Report) -> None:
    """A resolved recipe has its secrets taken out; they must come back before it can run."""
    if node == REDACTED:
        report.wrong(at, "was taken out when the recipe was saved; give it again.")
    for key, value in node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ():
        find_redacted(value, (*at, key), report)
