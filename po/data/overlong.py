"""The one policy for what is too long, and what must not survive it: empty and identical responses, false ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from po.data.finish import example_of
from po.data.report import Problem
from po.data.rows import Example, Row
from po.data.shorten import least_prompt, shortened
from po.data.tokenize import Coded, Encoder, Ids, RowFaultError
from po.spec import Overlong

Fate = Literal["kept", "bad", "overlong", "identical", "empty"]


@dataclass(frozen=True)
class Limits:
    """Lengths in tokens. max_length bounds prompt + response for each response by itself."""

    max_length: int
    max_prompt_length: int | None
    overlong: Overlong
    least: int = 2  # responses of a set that must remain

    def prompt_room(self) -> int:
        """The most tokens a prompt may have: a response has at least one."""
        return min(self.max_prompt_length or self.max_length, self.max_length - 1)


@dataclass
class Outcome:
    """What became of a row."""

    fate: Fate
    example: Example | None = None
    problem: Problem | None = None
    length: int = 0  # prompt + longest response before the policy
    counts: Counter[str] = field(default_factory=Counter)
    lines: dict[str, str] = field(default_factory=dict)  # listing: line

    def note(self, name: str, line: str) -> None:
        """Count the row under a listing's name and give the listing its line."""
        self.counts[name] += 1
        self.lines[name] = line


@dataclass
class _Draft:
    """A row on its way through the policy: responses by their index in the row."""

    row: Row
    prompt_ids: Ids
    response_ids: dict[int, Ids]
    privileged_ids: Ids | None
    limits: Limits
    notes: list[str] = field(default_factory=list)
    fate: Fate = "kept"

    def least(self) -> int:
        """How many responses the row must keep to be worth anything."""
        if self.row.kind == "prompt":
            return 0
        return len(self.row.responses) if self.row.is_pair else self.limits.least if self.row.kind == "set" else 1

    def drop(self, ks: Sequence[int], why: Fate) -> None:
        """Take responses away; the row goes with them where too few remain."""
        for k in ks:
            del self.response_ids[k]
        if len(self.response_ids) < self.least():
            self.fate = why


def settle(row: Row, encode: Encoder, limits: Limits) -> Outcome:
    """Tokenize a row and apply the policy. Never raises for a row's own fault; UserError for an unfit tokenizer."""
    try:
        coded = encode(row)
        before = max(len(coded.prompt_ids), len(coded.privileged_ids or ()))
        out = Outcome("kept", length=before + max(map(len, coded.response_ids), default=0))
        draft = _Draft(row, coded.prompt_ids, dict(enumerate(coded.response_ids)), coded.privileged_ids, limits)
        if row.kind == "prompt":
            _fit_prompt(draft, coded, encode, limits, out)
        else:
            _drop_empty(draft, encode, out)
            if draft.fate == "kept":
                _fit(draft, encode, limits, out)
            if draft.fate == "kept":
                _fit_privileged(draft, limits, out)
    except RowFaultError as e:
        return Outcome("bad", problem=e.problem)
    if draft.fate == "kept" and row.kind != "prompt":
        _drop_identical(draft, out)
    out.fate = draft.fate
    line = f"{row.where}: {'; '.join(draft.notes)}"
    if out.fate != "kept":
        return replace(out, counts=Counter(), lines={out.fate: line})  # its responses are not counted one by one
    out.example = example_of(row, draft.prompt_ids, draft.response_ids, draft.privileged_ids)
    _count(draft, encode, out)
    if draft.notes:
        out.note("cut", line)
        if limits.overlong == "error" and out.counts["responses_overlong"]:
            out.note("too_long", line)
    if coded.merged:
        out.note("boundary", f"{row.where}: {coded.merged!r}")
    out.counts["responses_eos_added"] += coded.appended
    return out


def _fit(draft: _Draft, encode: Encoder, limits: Limits, out: Outcome) -> None:
    """Make every sequence short enough, or drop what is not."""
    long = [k for k, ids in draft.response_ids.items() if len(draft.prompt_ids) + len(ids) > limits.max_length]
    if not long and len(draft.prompt_ids) <= limits.prompt_room():
        return
    if limits.overlong == "truncate_prompt":
        _cut_prompt(draft, encode, limits, out)
    elif len(draft.prompt_ids) > limits.prompt_room():
        draft.fate = "overlong"
        draft.notes.append(f"the prompt has {len(draft.prompt_ids)} tokens, room is {limits.prompt_room()}")
    elif limits.overlong == "truncate_response":
        _cut_long(draft, long, limits.max_length - len(draft.prompt_ids), out)
    else:  # drop; error too, which the caller raises for all rows at once
        _drop_long(draft, long, limits.max_length - len(draft.prompt_ids), out)


def _named(draft: _Draft, ks: Sequence[int]) -> str:
    """'responses[1] of 1200 tokens', or 'responses[1, 3, 4] of 700 to 1200 tokens'."""
    lengths = sorted({len(draft.response_ids[k]) for k in ks})
    return (
        f"responses[{', '.join(map(str, ks))}] of {' to '.join(map(str, lengths[:: max(1, len(lengths) - 1)]))} tokens"
    )


def _cut_long(draft: _Draft, long: Sequence[int], room: int, out: Outcome) -> None:
    if long:
        draft.notes.append(f"{_named(draft, long)}, cut to {room}")
    for k in long:
        draft.response_ids[k] = draft.response_ids[k][:room]
    out.counts["responses_cut"] += len(long)


def _drop_long(draft: _Draft, long: Sequence[int], room: int, out: Outcome) -> None:
    if long:
        draft.notes.append(f"{_named(draft, long)}, room is {room}")
    draft.drop(long, "overlong")
    out.counts["responses_overlong"] += len(long)


def _cut_prompt(draft: _Draft, encode: Encoder, limits: Limits, out: Outcome) -> None:
    """Shorten the prompt from the left until its longest response fits. A response that does not fit behind the
    shortest possible prompt goes as under `drop`."""
    least = least_prompt(draft.row, draft.prompt_ids, encode)
    if least > limits.prompt_room():
        draft.fate = "overlong"
        draft.notes.append(f"the prompt cannot be cut below {least} tokens, room is {limits.prompt_room()}")
        return
    room = limits.max_length - least
    _drop_long(draft, [k for k, ids in draft.response_ids.items() if len(ids) > room], room, out)
    if draft.fate != "kept":
        return
    room = min(limits.prompt_room(), limits.max_length - max(map(len, draft.response_ids.values()), default=0))
    if len(draft.prompt_ids) > room:
        before = len(draft.prompt_ids)
        draft.prompt_ids, rendered = shortened(draft.row, draft.prompt_ids, encode, room)
        draft.response_ids = {k: rendered.get(k, ids) for k, ids in draft.response_ids.items()}
        draft.notes.append(f"prompt cut from {before} to {len(draft.prompt_ids)} tokens")
        out.counts["prompts_cut"] += 1


def _fit_privileged(draft: _Draft, limits: Limits, out: Outcome) -> None:
    """A privileged prompt is never cut, and every response must fit behind it too."""
    tokens = len(draft.privileged_ids or ())
    room = limits.max_length - tokens
    long = [k for k, ids in draft.response_ids.items() if len(ids) > room]
    if room < 1:
        draft.fate = "overlong"
        draft.notes.append(f"the privileged prompt has {tokens} tokens, room is {limits.max_length - 1}")
    elif limits.overlong == "truncate_response":
        _cut_long(draft, long, room, out)
    else:
        _drop_long(draft, long, room, out)


def _fit_prompt(draft: _Draft, coded: Coded, encode: Encoder, limits: Limits, out: Outcome) -> None:
    """A prompt for a sampler must fit by itself; of the row's own responses stay those that can be scored after it."""
    if coded.apart:
        named = ", ".join(map(str, coded.apart))
        out.note("apart", f"{draft.row.where}: responses[{named}]")
    own, draft.response_ids = draft.response_ids, {}
    if limits.overlong == "truncate_prompt" and len(draft.prompt_ids) > limits.prompt_room():
        _cut_prompt(draft, encode, limits, out)
    elif len(draft.prompt_ids) > limits.prompt_room():
        draft.fate = "overlong"
        draft.notes.append(f"the prompt has {len(draft.prompt_ids)} tokens, room is {limits.prompt_room()}")
    privileged = len(draft.privileged_ids or ())
    if privileged > limits.prompt_room():
        draft.fate = "overlong"
        draft.notes.append(f"the privileged prompt has {privileged} tokens, room is {limits.prompt_room()}")
    room = limits.max_length - max(len(draft.prompt_ids), privileged)
    draft.response_ids = {k: ids for k, ids in own.items() if 0 < len(ids) <= room}
    out.counts["responses_overlong"] += sum(len(ids) > room for ids in own.values())


def _count(draft: _Draft, encode: Encoder, out: Outcome) -> None:
    """How the responses that are kept end."""
    out.counts["responses_kept"] += len(draft.response_ids)
    for k, ids in draft.response_ids.items():
        if encode.stops_at_end(ids):
            out.counts["responses_stop"] += 1
        elif not draft.row.responses[k].ended:
            out.counts["responses_open"] += 1


def _drop_empty(draft: _Draft, encode: Encoder, out: Outcome) -> None:
    said = isinstance(draft.row.prompt, str) and draft.row.prompt_ids is None  # a sampler may say nothing
    nothing = ((), (encode.eos,)) if said else ((),)
    empty = [k for k, ids in draft.response_ids.items() if ids in nothing]
    draft.notes += [f"responses[{k}] has no tokens" for k in empty]
    draft.drop(empty, "empty")
    out.counts["responses_empty"] += len(empty)


def _drop_identical(draft: _Draft, out: Outcome) -> None:
    """Different responses that became the same tokens. A sampler's honest repetitions are left alone."""
    seen: dict[Ids, int] = {}
    same = []
    for k, ids in draft.response_ids.items():
        first = seen.setdefault(ids, k)
        if draft.row.responses[k].content != draft.row.responses[first].content:
            draft.notes.append(f"responses[{k}] became identical to responses[{first}]")
            same.append(k)
    draft.drop(same, "identical")
    out.counts["responses_identical"] += len(same)
