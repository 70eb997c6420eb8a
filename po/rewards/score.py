"""Rewards of sampled completions: several with weights, and nothing that fails becomes a number.

For each completion, each reward gives a number, None (it does not apply to this row) or a failure. The total is the
sum of weight x number over those that apply, as TRL does. A failure of a reward with a weight leaves the completion
without a total: a caller must drop it or stop, never take it for 0. So does None from all rewards.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from po.rewards.cells import Call, Cell, Failure, text_of
from po.rewards.shaping import Seen
from po.rewards.worker import Worker

_EXAMPLES = 3  # texts kept of each kind of problem
_QUERY = re.compile(r"([?&][^=&\s]+=)[^&\s'\"]+")


@dataclass(frozen=True)
class Scored:
    """What the rewards say of one completion."""

    reward: float | None  # None: unscored
    parts: Mapping[str, float | None]  # by reward, unweighted; None: does not apply, or failed
    problems: tuple[str, ...]  # "name/kind: text"


@dataclass(frozen=True)
class Entry:
    """One reward of the recipe."""

    name: str
    weight: float
    source: Any  # a Worker, a Model or a Shaping
    timeout: float = math.inf
    reads: tuple[str, ...] = ()  # the columns that a built-in one reads

    def __call__(self, call: Call) -> tuple[list[Cell], Counter[str]]:
        if isinstance(self.source, Worker):
            return self.source(replace(call, seconds=self.timeout))
        return self.source(call), Counter()


class Rewards:
    """All rewards of a run. Close it, or leave it to the end of the process.

    counts: completions by "name/kind" of what happened to them (raised, timeout, died, nan, inf, type, count, overlong,
    none) and what verifiers count themselves; "unscored" is how many got no total. texts: the first few of each
    kind of problem, without secrets.
    """

    def __init__(self, entries: Sequence[Entry], tokenizer: Any = None) -> None:
        self._entries, self._tokenizer = tuple(entries), tokenizer
        self.names = tuple(e.name for e in entries)
        self.columns = frozenset(name for e in entries for name in e.reads)  # that the rows must have
        self.counts: Counter[str] = Counter()
        self.texts: dict[str, list[str]] = defaultdict(list)

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        columns: Mapping[str, Sequence[Any]] = {},
        groups: Sequence[int] | None = None,
    ) -> list[Scored]:
        """One Scored for each completion, in order.

        Prompts and completions are strings or lists of messages; columns have one entry per completion. groups says
        which completions answer the same prompt; None: those whose prompts are equal.
        """
        sizes = {len(prompts), len(completions), *map(len, columns.values())}
        sizes |= {len(x) for x in (completion_ids, groups) if x is not None}
        if sizes != {len(completions)}:
            raise ValueError(f"prompts, completions, their ids, groups and columns differ in number: {sorted(sizes)}")
        if completion_ids is None and self._tokenizer is not None and completions:
            texts = [text_of(c) for c in completions]
            completion_ids = self._tokenizer(texts, add_special_tokens=False)["input_ids"]
        call = Call(prompts, completions, completion_ids, columns)
        parts = self._parts(call, groups) if completions else {}
        return [self._total({name: found[i] for name, found in parts.items()}) for i in range(len(call))]

    def _parts(self, call: Call, groups: Sequence[int] | None) -> dict[str, Sequence[Cell]]:
        """The plain rewards at the same time, then those that read them."""
        plain = [e for e in self._entries if not hasattr(e.source, "of")]
        parts: dict[str, Sequence[Cell]] = {}
        with ThreadPoolExecutor(len(plain) or 1) as pool:
            for entry, (found, counts) in zip(plain, pool.map(lambda e: e(call), plain)):
                parts[entry.name] = self._note(entry.name, found, counts)
        members: dict[Any, list[int]] = defaultdict(list)
        for i, key in enumerate(groups if groups is not None else map(_key, call.prompts)):
            members[key].append(i)
        for entry in self._entries:
            if entry.name not in parts:
                found, counts = entry.source(Seen(call, parts, list(members.values())))
                parts[entry.name] = self._note(entry.name, found, counts)
        return {name: parts[name] for name in self.names}

    def _note(self, name: str, found: list[Cell], counts: Counter[str]) -> list[Cell]:
        """Count; returns the cells with clean texts."""
        self.counts.update({f"{name}/{what}": n for what, n in counts.items() if n})
        self.counts[f"{name}/none"] += sum(c is None for c in found)
        out: list[Cell] = []
        for one in found:
            if isinstance(one, Failure):
                one = replace(one, text=clean(one.text))
                key = f"{name}/{one.kind}"
                self.counts[key] += 1
                if len(self.texts[key]) < _EXAMPLES and one.text not in self.texts[key]:
                    self.texts[key].append(one.text)
            out.append(one)
        self.counts += Counter()  # drops zeros
        return out

    def _total(self, cells: Mapping[str, Cell]) -> Scored:
        problems = [f"{n}/{c.kind}: {c.text}" for n, c in cells.items() if isinstance(c, Failure)]
        parts = {n: None if isinstance(c, Failure) else c for n, c in cells.items()}
        weighted = [(e.weight, cells[e.name]) for e in self._entries if e.weight != 0]
        reward: float | None = None
        if not any(isinstance(c, Failure) for _, c in weighted):
            numbers = [w * c for w, c in weighted if isinstance(c, float)]
            reward = math.fsum(numbers) if numbers else None
            if reward is None:
                problems.append("none: no reward applies to this completion")
            elif not math.isfinite(reward):
                problems.append(f"inf: the weighted sum is {reward}")
                reward = None
        self.counts["unscored"] += reward is None
        self.counts += Counter()
        return Scored(reward, parts, tuple(problems))

    def close(self) -> None:
        """End the processes."""
        for entry in self._entries:
            if isinstance(entry.source, Worker):
                entry.source.close()


def _key(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, default=str)


def clean(text: str) -> str:
    """A text without secrets (user info and queries of addresses, what looks like a key), cut to 300 characters."""
    from po.folder import redact  # imports torch

    return str(redact(_QUERY.sub(r"\1[redacted]", text[:3000])))[:300]
