"""From what a recipe says of its rewards to objects that compute them, checked before anything is sampled."""

from __future__ import annotations

import importlib.util
import os
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

from po.errors import UserError, suggest
from po.rewards.code import Code
from po.rewards.endpoint import Endpoint
from po.rewards.functions import Function
from po.rewards.mathematics import Math
from po.rewards.score import Entry, Rewards
from po.rewards.shaping import AnchorRank, Contrastive, CorrectLength, GroupContrast
from po.rewards.verifiers import Exact, Format, Length, Repetition, SoftOverlong
from po.rewards.worker import Worker

if TYPE_CHECKING:  # it imports torch, which the workers must not wait for
    from po.spec import RewardSpec

T = TypeVar("T")

VERIFIERS: dict[str, type] = {
    "anchor_rank": AnchorRank,
    "code": Code,
    "contrastive": Contrastive,
    "correct_length": CorrectLength,
    "exact": Exact,
    "format": Format,
    "group_contrast": GroupContrast,
    "length": Length,
    "math": Math,
    "repetition": Repetition,
    "soft_overlong": SoftOverlong,
}
_SHAPING = (AnchorRank, Contrastive, CorrectLength, GroupContrast)
_KINDS = ("classifier", "implicit", "ordinal")


def reward_name(spec: RewardSpec) -> str:
    """What a reward is called in metrics and columns: its name, else what computes it, without secrets."""
    if spec.name or spec.verifier:
        return str(spec.name or spec.verifier)
    if spec.url is not None:
        parts = urllib.parse.urlsplit(spec.url)
        return f"{parts.netloc.rpartition('@')[2]}{parts.path}"
    return PurePath(spec.model).name if spec.model is not None else str(spec.function).rpartition(":")[2]


def build_rewards(
    specs: Sequence[RewardSpec],
    *,
    tokenizer: Any = None,
    device: str = "cpu",
    where: str | Sequence[str] = "rollout.rewards",
) -> Rewards:
    """Start the workers and load the models. The tokenizer serves where completions come without token ids.

    where: of the list of rewards, or of each of them, for messages.
    Raises UserError for what cannot work: a missing function, package, variable or model, options that do not fit.
    """
    entries: list[Entry] = []
    places = [f"{where}[{i}]" for i in range(len(specs))] if isinstance(where, str) else where
    try:
        for spec, place in zip(specs, places, strict=True):
            entries.append(_entry(spec, device, place))
        _check_names(entries, places)
    except BaseException:
        Rewards(entries).close()
        raise
    return Rewards(entries, tokenizer)


def _entry(spec: RewardSpec, device: str, where: str) -> Entry:
    given = [k for k in ("function", "verifier", "model", "url") if getattr(spec, k) is not None]
    if len(given) != 1:
        raise UserError(f"{where}: expected exactly one of function, verifier, model and url, got {given or 'none'}")
    name, options = reward_name(spec), dict(spec.options)
    if spec.model is not None:
        return Entry(name, spec.weight, _model(spec, options, device, where), spec.timeout)
    target: Any
    if spec.function is not None:
        if options:
            raise UserError(f"{where}.options: a function takes none, got {', '.join(options)}")
        target = Function(spec.function)
    elif spec.url is not None:
        target = _endpoint(spec.url, options, where)
    else:
        target = _verifier(str(spec.verifier), options, where)
        if isinstance(target, _SHAPING):
            return Entry(name, spec.weight, target, spec.timeout, tuple(target.reads))
    worker = Worker(target)
    failure = worker.start()
    if failure is not None:
        worker.close()
        raise UserError(f"{where}.{given[0]}: {failure.text}")
    return Entry(name, spec.weight, worker, spec.timeout, tuple(getattr(target, "reads", ())))


def _verifier(name: str, options: dict[str, Any], where: str) -> Any:
    if name not in VERIFIERS:
        known = ", ".join(VERIFIERS)
        raise UserError(
            f"{where}.verifier: there is no verifier {name!r}.{suggest(name, VERIFIERS)} There are: {known}"
        )
    if name == "math" and importlib.util.find_spec("math_verify") is None:
        raise UserError(f"{where}.verifier: math needs the package math-verify; pip install 'po[math]'")
    return _fit(VERIFIERS[name], options, where)


def _endpoint(url: str, options: dict[str, Any], where: str) -> Endpoint:
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise UserError(f"{where}.url: expected an address that begins with http:// or https://")
    target = _fit(Endpoint, options | {"url": url}, where, ("url",))
    if target.token_env is not None and target.token_env not in os.environ:
        raise UserError(f"{where}.options.token_env: the environment has no variable {target.token_env!r}; set it")
    return target


def _model(spec: RewardSpec, options: dict[str, Any], device: str, where: str) -> Any:
    from po.rewards import models, ordinal

    kind = options.pop("kind", "classifier")
    if kind not in _KINDS:
        raise UserError(f"{where}.options.kind: expected one of {', '.join(_KINDS)}, got {kind!r}")
    if spec.timeout != type(spec)().timeout:
        raise UserError(f"{where}.timeout: has no effect on a model, which runs in this process; leave it out")
    made: dict[str, tuple[type, type]] = {
        "classifier": (models.Classifier, models.ClassifierOptions),
        "implicit": (models.Implicit, models.ImplicitOptions),
        "ordinal": (ordinal.Ordinal, ordinal.OrdinalOptions),
    }
    build, known = made[kind]
    return build(spec.model, _fit(known, options, where), device, f"{where}.model")


def _fit(cls: type[T], options: Mapping[str, Any], where: str, ours: Sequence[str] = ()) -> T:
    """A dataclass from options; UserError for unknown ones, wrong types and what is missing. ours: no options."""
    from pydantic import TypeAdapter, ValidationError

    hints = get_type_hints(cls, include_extras=True)
    known = [f.name for f in fields(cls) if f.name not in ours]  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in options.items():
        at = f"{where}.options.{key}"
        if key not in (*known, *ours):
            raise UserError(f"{at}: unknown option.{suggest(key, known)} It has: {', '.join(known) or 'none'}")
        try:
            if isinstance(value, bool) and hints[key] is not bool:
                raise UserError(f"{at}: did not expect {str(value).lower()}")
            values[key] = TypeAdapter(hints[key]).validate_python(value)
        except ValidationError as e:
            said = e.errors()[0]["msg"]
            raise UserError(f"{at}: got {value!r}. {said[0].upper()}{said[1:]}") from None
    for f in fields(cls):  # type: ignore[arg-type]
        if f.default is MISSING and f.name not in values:
            raise UserError(f"{where}.options.{f.name}: is missing")
    return cls(**values)


def _check_names(entries: Sequence[Entry], places: Sequence[str]) -> None:
    for i, entry in enumerate(entries):
        before = [e.name for e in entries[:i]]
        if entry.name in before:
            raise UserError(f"{places[i]}.name: {entry.name!r} is the name of two rewards; name one of them")
        for option, name in getattr(entry.source, "of", {}).items():
            if name not in before:
                raise UserError(
                    f"{places[i]}.options.{option}: no reward before this one is named {name!r}."
                    f"{suggest(name, before)} Before it: {', '.join(before) or 'none'}"
                )
