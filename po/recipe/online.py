"""What a recipe with a `rollout` section must agree on with its heads, reference and data."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from po.recipe.report import Report
from po.rewards import reward_name
from po.spec import Recipe, RolloutSpec
from po.types import Head

SAMPLED = ("gold", "from_reference")  # response columns that rollouts know, besides each reward's own
_NOT_SAMPLED = {
    "embedding": "an embedding of every response",
    "teacher": "a teacher's log-probs of every response",
    "token_columns": "numbers for every token",
    "mismatch": "another row's response after the prompt",
}


def check(recipe: Recipe, given: Mapping[str, Any], sound: bool, report: Report) -> Recipe:
    """Report every contradiction; returns the recipe with a kind of reference that can follow samples.

    given: the canonical tree. sound: whether loss and reference could be read.
    """
    spec = recipe.rollout
    if spec is None:
        return recipe
    said = given.get("rollout") or {}
    _rewards(spec, report)
    _pointless(spec, said, report)
    if spec.max_completion_length >= recipe.data.max_length:
        report.wrong(
            ("rollout", "max_completion_length"),
            f"is {spec.max_completion_length}, which leaves no room for a prompt in data.max_length "
            f"{recipe.data.max_length}; raise that.",
        )
    if recipe.train["load_best_model_at_end"] and recipe.train["metric_for_best_model"] is None:
        report.wrong(
            ("train", "metric_for_best_model"), "is missing; a run that samples has no eval_loss. Write `reward`."
        )
    if sound:
        _heads(recipe, spec, report)
        return _reference(recipe, given, spec, report)
    return recipe


def _rewards(spec: RolloutSpec, report: Report) -> None:
    names: list[str] = []
    for i, one in enumerate(spec.rewards):
        kinds = [k for k in ("function", "verifier", "model", "url") if getattr(one, k) is not None]
        if len(kinds) != 1:
            found = " and ".join(kinds) or "none of them"
            report.wrong(
                ("rollout", "rewards", i),
                f"expected exactly one of function, verifier, model and url, got {found}; see docs/rewards.md.",
            )
            continue
        if one.url is not None and _has_secret(one.url):
            report.wrong(
                ("rollout", "rewards", i, "url"),
                "holds a user, a password or a token, and recipes are copied into the run's folder; put the token into "
                "an environment variable and name that at options.token_env.",
            )
        if reward_name(one) in names:
            report.wrong(
                ("rollout", "rewards", i, "name"), f"{reward_name(one)!r} is the name of two rewards; name one of them."
            )
        names.append(reward_name(one))


def _has_secret(url: str) -> bool:
    parts = urlsplit(url)
    return "@" in parts.netloc or any(re.search("key|token|secret|passw", k, re.I) for k, _ in parse_qsl(parts.query))


def _pointless(spec: RolloutSpec, said: Mapping[str, Any], report: Report) -> None:
    for key, needed, value in (
        ("refill_budget", "zero_variance", "refill"),
        ("correction_cap", "correction", "token"),
    ):
        off = getattr(spec, needed) in ("keep", "drop", "none")
        if said.get(key) is not None and off and getattr(spec, key) != getattr(RolloutSpec, key):
            report.wrong(("rollout", key), f"has no effect without `{needed}: {value}`; write that or leave this out.")
    unknown = [n for n in spec.consistency or () if n not in map(reward_name, spec.rewards)]
    if unknown:
        names = ", ".join(map(reward_name, spec.rewards))
        report.wrong(("rollout", "consistency"), f"no reward is named {unknown[0]!r}; there are: {names or 'none'}.")
    if spec.from_reference > spec.num_generations:
        report.wrong(
            ("rollout", "from_reference"), f"is {spec.from_reference} of {spec.num_generations} samples; at most all."
        )


def _heads(recipe: Recipe, spec: RolloutSpec, report: Report) -> None:
    from po.recipe.checks import name_of

    reads_labels = reads_rewards = False
    for term in recipe.loss:
        needs, name = term.head.needs, name_of(term.head)
        for need, what in _NOT_SAMPLED.items():
            if getattr(needs, need):
                report.wrong(("loss",), f"head {name!r} needs {what}, which samples do not have; train it on a file.")
        columns = {*SAMPLED, *map(reward_name, spec.rewards)}
        for column in sorted(set(needs.response_columns) - columns):
            report.wrong(
                ("loss",), f"head {name!r} needs a number {column!r} on every response; name a reward that computes it."
            )
        _groups(term.head, name, spec, report)
        reads_rewards |= needs.reward or needs.layout == "pair"
        reads_labels |= needs.label or needs.layout in ("unpaired", "labelled")
    if not spec.rewards and (reads_rewards or spec.label_above is not None or spec.gold != "never"):
        report.wrong(("rollout", "rewards"), "is missing; expected at least one, e.g. `rewards: {verifier: math}`.")
    if reads_labels and spec.label_above is None and not spec.own_responses:
        report.wrong(
            ("rollout", "label_above"),
            "is missing; a head of the recipe needs labels. Write the reward above which a sample is desirable, e.g. "
            "0.5, or `own_responses: true` where the rows bring labelled ones.",
        )
    if spec.label_above is not None and not reads_labels:
        report.wrong(("rollout", "label_above"), "has no effect: no head of the recipe reads labels; leave it out.")
    if spec.consistency and not any("consistency" in t.head.needs.columns for t in recipe.loss):
        report.wrong(("rollout", "consistency"), "has no effect: no head of the recipe reads it; leave it out.")
    if spec.correction != "none" and not any(t.head.needs.correction for t in recipe.loss):
        report.wrong(("rollout", "correction"), "has no effect: no head of the recipe applies it; leave it out.")


def _groups(head: Head, name: str, spec: RolloutSpec, report: Report) -> None:
    """How many samples of a prompt a head compares, how long they are, and which prompt they answer."""
    size, wanted = spec.num_generations + spec.own_responses, head.needs.group_size
    if wanted not in (None, size):
        report.wrong(
            ("rollout", "num_generations"),
            f"is {spec.num_generations}, and head {name!r} compares exactly {wanted} responses; write "
            f"{wanted - spec.own_responses}, or use a head for any number.",
        )
    elif _compares(head) and size < 2:
        report.wrong(
            ("rollout", "num_generations"), f"head {name!r} compares responses; sample at least 2 of each prompt."
        )
    asked = getattr(head, "max_completion_length", spec.max_completion_length)
    if asked != spec.max_completion_length:
        report.wrong(
            ("loss",),
            f"head {name!r} divides by max_completion_length {asked}, and rollout.max_completion_length is "
            f"{spec.max_completion_length}; write the same number.",
        )
    source = head.needs.samples_from or (None if head.needs.privileged else "prompt")
    if source not in (None, spec.sample_from):
        report.wrong(
            ("rollout", "sample_from"), f"is {spec.sample_from!r}; head {name!r} is for samples from {source!r}."
        )


def _compares(head: Head) -> bool:
    by_group = getattr(head, "baseline", "none") == "group"  # reinforce_pp
    return head.needs.layout in ("pair", "set") and (by_group or not head.needs.single)


def _reference(recipe: Recipe, given: Mapping[str, Any], spec: RolloutSpec, report: Report) -> Recipe:
    """`cached` cannot hold log-probs of answers that are not written yet."""
    reference = recipe.reference
    if reference.source == "none":
        if spec.from_reference:
            report.wrong(
                ("rollout", "from_reference"), "needs a reference, and no head of the recipe has one; leave it out."
            )
        return recipe
    if reference.kind != "cached":
        return recipe
    raw = given.get("reference")
    if isinstance(raw, Mapping) and raw.get("kind") == "cached":
        report.wrong(
            ("reference", "kind"),
            "is 'cached', and a cache cannot hold the log-probs of answers that are yet to be sampled; write "
            "`kind: adapter_off` (LoRA) or `kind: frozen` (a second copy of the model).",
        )
        return recipe
    kind: Any = "adapter_off" if _switchable(recipe) else "frozen"
    report.note(f"reference.kind: {kind}, because answers that are yet to be sampled cannot be cached")
    return replace(recipe, reference=replace(reference, kind=kind))


def _switchable(recipe: Recipe) -> bool:
    """Whether the policy with its adapter off is the reference."""
    source, model = recipe.reference.source, recipe.model
    return source == "base" if model.adapter is not None else recipe.lora is not None and source in ("init", "base")
