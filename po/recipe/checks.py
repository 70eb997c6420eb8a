"""What no single field can say: combinations that contradict each other, would be ignored, or cannot work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from po.errors import UserError
from po.recipe import online
from po.recipe.report import Report
from po.spec import Recipe
from po.types import Head
from po.zero import MIRRORED, deepspeed_config, stage


def check(recipe: Recipe, given: Mapping[str, Any], report: Report) -> Recipe:
    """Report every contradiction; returns the recipe with what follows from it filled in.

    given: the recipe's canonical tree, which tells what the user wrote from what is a default.
    """
    broken = frozenset(report.broken)

    def sound(*sections: str) -> bool:
        return broken.isdisjoint(sections)

    zero = _zero(recipe, sound("train"), report) if sound("deepspeed") else 0
    if sound("model", "lora"):
        _lora(recipe, zero, report)
    if sound("model", "lora", "reference", "loss"):
        recipe = _reference(recipe, given, report)
    if sound("model", "lora", "data", "train", "rollout"):
        recipe = online.check(recipe, given, sound("reference", "loss"), report)
    if sound("data"):
        _data(recipe, sound("loss"), report)
    if sound("data", "train"):
        _train(recipe, given, report)
    return recipe


def check_shared(recipe: Recipe, given: Mapping[str, Any], report: Report) -> None:
    """The part of `check` that does not depend on heads, for recipes that have none."""
    broken = frozenset(report.broken)
    zero = _zero(recipe, "train" not in broken, report) if "deepspeed" not in broken else 0
    if broken.isdisjoint(("model", "lora")):
        _lora(recipe, zero, report)
    if "data" not in broken:
        _data(recipe, False, report)
    if broken.isdisjoint(("data", "train")):
        _train(recipe, given, report)


def _adapted(recipe: Recipe) -> bool:
    return recipe.lora is not None or recipe.model.adapter is not None


def _zero(recipe: Recipe, train: bool, report: Report) -> int:
    try:
        config, number = deepspeed_config(recipe.deepspeed), stage(recipe.deepspeed)
    except UserError as e:
        report.wrong((), str(e))
        return 0
    for theirs, ours in MIRRORED.items() if train else ():
        said = (config or {}).get(theirs, "auto")
        if said != "auto" and said != recipe.train.get(ours):
            report.wrong(
                ("deepspeed", theirs), f"is {said}, but train.{ours} is {recipe.train.get(ours)}; write 'auto' here."
            )
    return number


def _lora(recipe: Recipe, zero: int, report: Report) -> None:
    lora, model = recipe.lora, recipe.model
    if model.load_in_4bit and not _adapted(recipe):
        report.wrong(("model", "load_in_4bit"), "4-bit weights cannot be trained; add `lora: {r: 16}`.")
    if model.load_in_4bit and zero == 3:
        report.wrong(("model", "load_in_4bit"), "ZeRO-3 cannot partition 4-bit weights; use `deepspeed: zero2`.")
    if model.dtype == "float16" and not _adapted(recipe):
        report.wrong(
            ("model", "dtype"), "all weights cannot be trained in float16; use bfloat16, or float32 with train.fp16."
        )
    if lora is None:
        return
    if lora.use_dora:
        report.note("lora.use_dora: vLLM does not load DoRA adapters; export with `po export RUN --merged` to serve it")
    if lora.modules_to_save:
        report.note("lora.modules_to_save: vLLM does not load such adapters; export with `po export RUN --merged`")
    if zero == 3 and lora.modules_to_save:
        report.wrong(
            ("lora", "modules_to_save"), "does not work under ZeRO-3; leave it out, or use `deepspeed: zero2`."
        )
    named = (lora.target_modules,) if isinstance(lora.target_modules, str) else lora.target_modules
    if zero == 3 and any("lm_head" in name for name in named):
        report.wrong(("lora", "target_modules"), "LoRA on lm_head does not work under ZeRO-3; use `deepspeed: zero2`.")


def _reference(recipe: Recipe, given: Mapping[str, Any], report: Report) -> Recipe:
    source, kind = recipe.reference.source, recipe.reference.kind
    needing = [name_of(t.head) for t in recipe.loss if t.head.needs.any_reference]
    if not needing:
        if given.get("reference") and source != "none":
            report.note(f"reference: {source!r} is not computed, because no head of the recipe needs a reference")
        return replace(recipe, reference=replace(recipe.reference, source="none", kind="cached"))
    if source == "none":
        report.wrong(
            ("reference", "from"),
            f"is 'none', but the head {needing[0]!r} needs a reference; write init (the policy at step 0), base (the "
            "model without its adapter), or the path of a model.",
        )
    if kind == "adapter_off":
        _adapter_off(recipe, report)
    live = [name_of(t.head) for t in recipe.loss if t.head.needs.live_reference]
    if kind == "cached" and live:
        report.wrong(
            ("reference", "kind"),
            f"is 'cached', which keeps the reference's log-probs alone, and the head {live[0]!r} reads more of it; "
            "write `kind: adapter_off` (LoRA) or `kind: frozen` (a second copy of the model).",
        )
    return recipe


def _adapter_off(recipe: Recipe, report: Report) -> None:
    source, at = recipe.reference.source, ("reference", "kind")
    if not _adapted(recipe):
        report.wrong(
            at,
            "adapter_off computes the reference by switching the adapter off, and there is none; add "
            "`lora: {r: 16}`, or write `kind: cached` or `kind: frozen`.",
        )
    elif source == "init" and recipe.model.adapter is not None:
        report.wrong(
            at,
            "adapter_off gives the base model, but this run starts from model.adapter, which is its own "
            "reference (from: init). Write `kind: cached` or `kind: frozen`, or `from: base` if the base is meant.",
        )
    elif source not in ("init", "base", "none"):
        report.wrong(at, f"adapter_off gives the base model, not {source!r}; write `kind: cached` or `kind: frozen`.")


def _data(recipe: Recipe, loss: bool, report: Report) -> None:
    data, layouts = recipe.data, {t.head.needs.layout for t in recipe.loss}
    if data.max_prompt_length is not None and data.max_prompt_length >= data.max_length:
        report.wrong(
            ("data", "max_prompt_length"),
            f"is {data.max_prompt_length}, which leaves no room for a response in max_length {data.max_length}.",
        )
    if data.pairing == "margin" and data.pairing_margin is None:
        report.wrong(
            ("data", "pairing_margin"), "is missing; `pairing: margin` takes the least reward difference, e.g. 1.0."
        )
    if data.pairing != "margin" and data.pairing_margin is not None:
        report.wrong(
            ("data", "pairing_margin"), f"has no effect with `pairing: {data.pairing}`; write `pairing: margin`."
        )
    if loss and data.pairing != "best_vs_worst" and "pair" not in layouts:
        report.note(f"data.pairing: {data.pairing!r} has no effect, because no head of the recipe takes pairs")


def _train(recipe: Recipe, given: Mapping[str, Any], report: Report) -> None:
    train, said = recipe.train, given.get("train") or {}
    if not recipe.data.eval:
        for key, off in (("eval_strategy", "no"), ("eval_on_start", False), ("load_best_model_at_end", False)):
            if train[key] != off:
                report.wrong(("train", key), "needs evaluation rows; name them at data.eval, or leave this line out.")
    elif said.get("eval_strategy") == "no":
        report.note("data.eval: is not read during training, because train.eval_strategy is 'no'")
    if train["bf16"] and train["fp16"]:
        report.wrong(("train", "fp16"), "and bf16 are both true; keep one of them.")
    if train["max_steps"] > 0 and said.get("num_train_epochs") is not None:
        report.note(f"train.num_train_epochs: has no effect, because max_steps is {train['max_steps']}")
    if train["train_sampling_strategy"] not in ("random", "sequential"):
        report.wrong(
            ("train", "train_sampling_strategy"),
            f"expected 'random' or 'sequential', got {train['train_sampling_strategy']!r}; po packs without padding, "
            "so grouping by length gains nothing.",
        )
    for key in ("logging_steps", "eval_steps", "save_steps"):
        value = train[key]
        if value is not None and value > 1 and value != int(value):
            report.wrong(("train", key), f"expected a whole number of steps, or a share below 1, got {value}.")


def name_of(head: Head) -> str:
    """A head's name in a recipe."""
    from po.heads import HEADS

    return next(name for name, cls in HEADS.items() if type(head) is cls)
