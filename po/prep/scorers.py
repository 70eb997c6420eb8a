"""Scorers as they are stated, rewards as in a recipe's `rollout.rewards` and judges, and made ready to score."""

from __future__ import annotations

import argparse
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from po.errors import UserError
from po.prep.chat import Chat
from po.prep.chat_arguments import chat
from po.prep.judge import Judge
from po.prep.judge_spec import JudgeSpec, check, prompt_of
from po.recipe import text
from po.recipe.fields import parse, shown, unknown
from po.recipe.report import Report
from po.rewards import Rewards, build_rewards, reward_name
from po.spec import ModelSpec, RewardSpec

GIVEN = "given"  # the scorer that is the rewards which rows bring
_JUDGES = ("pointwise", "pairwise")
_OWN = ("model", "url", "key_env")


@dataclass(frozen=True)
class Entry:
    """One scorer as stated, and where."""

    place: str
    spec: RewardSpec | JudgeSpec

    @property
    def name(self) -> str:
        """In `scores`."""
        return reward_name(self.spec) if isinstance(self.spec, RewardSpec) else self.spec.name or self.spec.judge


def stated(path: str | None, inline: Sequence[str]) -> list[Entry]:
    """The entries of a file (`scorers:`, a list) and of the command line, in that order. Raises UserError."""
    found: list[Entry] = []
    if path is not None:
        found += _of(_listed(path), Report(path), ("scorers",))
    found += _of([_word(word) for word in inline], Report("--scorer"), ())
    if not found:
        raise UserError("expected a scorer: --scorer 'ENTRY' (`math`, or '{model: FOLDER}'), or --scorers FILE")
    for i, entry in enumerate(found):
        if entry.name in [GIVEN, *(e.name for e in found[:i])]:
            taken = "stands for the rows' own rewards" if entry.name == GIVEN else "is the name of two scorers"
            raise UserError(f"{entry.place}.name: {entry.name!r} {taken}; give another `name`")
    return found


def _listed(path: str) -> list[Any]:
    if not Path(path).is_file() or not Path(path).read_bytes().strip():
        raise UserError(f"--scorers: {path}: expected a YAML file with `scorers:` and a list below it")
    tree, report = text.read(path), Report(path)
    for key in (k for k in tree if k != "scorers"):
        unknown(key, ["scorers"], (), report)
    if not isinstance(tree.get("scorers"), list):
        report.wrong(("scorers",), f"expected a list of scorers, got {shown(tree.get('scorers'))}")
    report.stop()
    return list(tree["scorers"])


def _word(word: str) -> Any:
    """{a: mapping} as in a recipe; a bare word is a verifier's name, or a kind of judge."""
    value = text.scalar(word)
    if isinstance(value, str):
        if word[:1] in "{[":
            example = "'{verifier: math, weight: 0.5}'"
            raise UserError(f"--scorer: expected a mapping as recipes have it, e.g. {example}, got {word!r}")
        return {"judge" if value in _JUDGES else "verifier": value}
    return value


def _of(raws: Sequence[Any], report: Report, at: tuple[str, ...]) -> list[Entry]:
    specs: list[RewardSpec | JudgeSpec | None] = []
    for i, raw in enumerate(raws):
        kind: Any = JudgeSpec if isinstance(raw, Mapping) and "judge" in raw else RewardSpec
        specs.append(parse(kind, raw, (*at, i), report))
    report.stop()
    return [Entry(f"{report.file}: {text.show((*at, i))}", s) for i, s in enumerate(specs) if s is not None]


@dataclass(frozen=True)
class Scorers:
    """What scores, in the order of `names`: rewards, all of which run before the judges."""

    entries: tuple[Entry, ...]
    rewards: Rewards | None
    judges: tuple[Judge, ...]

    @property
    def weights(self) -> dict[str, float]:
        """By name, in the order stated."""
        return {e.name: e.spec.weight for e in self.entries}

    def close(self) -> None:
        """End the processes of rewards."""
        if self.rewards is not None:
            self.rewards.close()


def ready(entries: Sequence[Entry], args: argparse.Namespace) -> Scorers:
    """Models loaded, processes started. args: the script's. Raises UserError for what cannot work."""
    import torch

    judges, chats, rewards = [], dict[tuple[Any, ...], Chat](), None
    for entry in entries:
        if isinstance(entry.spec, JudgeSpec):
            judges.append(Judge(entry.name, entry.spec, _chat(entry, args, chats), prompt_of(entry.spec)))
    plain = [(e.place, e.spec) for e in entries if isinstance(e.spec, RewardSpec)]
    if plain:
        places, specs = zip(*plain, strict=True)
        from po.policy import load_tokenizer

        tokenizer = None if args.tokenizer is None else load_tokenizer(ModelSpec(args.tokenizer))
        device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        rewards = build_rewards(specs, tokenizer=tokenizer, device=device, where=places)
    return Scorers(tuple(entries), rewards, tuple(judges))


def check_judges(entries: Sequence[Entry], args: argparse.Namespace) -> None:
    """Raises UserError for judges without a model, a model without a judge, and `best_by` of what is not there."""
    judges = [(i, e.place, e.spec) for i, e in enumerate(entries) if isinstance(e.spec, JudgeSpec)]
    if args.model is not None and all(spec.model is not None for _, _, spec in judges):
        mend = "A reward model is a scorer: --scorer '{model: FOLDER}'"
        raise UserError(f"--model: is for judges without a `model` of their own, and there is none. {mend}")
    for i, place, spec in judges:
        check(spec, place)
        known = [e.name for e in entries[:i]] + [GIVEN]
        if spec.best_by is not None and spec.best_by not in known:
            found = f"expected a scorer before this one ({', '.join(known)}), got {spec.best_by!r}"
            raise UserError(f"{place}.best_by: {found}")
        if args.model is None and spec.model is None:
            raise UserError(f"{place}: a judge needs a model: --model MODEL, or `model` in the entry")
        if args.ray is not None and (args.url is not None or spec.url is not None):
            raise UserError("--ray: is for models that run here; one process asks a server as fast as it can answer")


def _chat(entry: Entry, args: argparse.Namespace, made: dict[tuple[Any, ...], Chat]) -> Chat:
    """The judge's model. Each has a journal of its own; the command line's has the output's name. The command line's
    key is for its own server."""
    own = {k: v for k in _OWN if (v := getattr(entry.spec, k)) is not None}
    mine = argparse.Namespace(**{**vars(args), **({"key_env": None} if "url" in own else {}), **own})
    key = tuple(getattr(mine, k) for k in _OWN)
    if key not in made:
        beside = args.output
        if own:
            beside = beside.with_name(f"{beside.name}.{re.sub(r'[^A-Za-z0-9.-]', '_', entry.name)}")
        made[key] = chat(mine, beside)
    return made[key]


def described(entries: Sequence[Entry], args: argparse.Namespace) -> list[dict[str, Any]]:
    """What decides the scores, for the report and to tell one command from another."""
    found = []
    for entry in entries:
        plain = JudgeSpec(entry.spec.judge) if isinstance(entry.spec, JudgeSpec) else RewardSpec()
        names = [f.name for f in fields(entry.spec)]
        said = {n: v for n in names if (v := getattr(entry.spec, n)) != getattr(plain, n)}
        if isinstance(entry.spec, JudgeSpec):
            said = {k: v for k, v in said.items() if k not in ("url", "key_env")}  # a server may have moved
            said |= {"model": entry.spec.model or args.model, "prompt": prompt_of(entry.spec).said}
        file = Path(str(said.get("function", "")).rpartition(":")[0])
        if file.suffix == ".py" and file.is_file():
            said["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
        found.append({**said, "name": entry.name})
    return found
