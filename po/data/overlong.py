"""The one policy for what is too long, and what must not survive it: empty and identical responses, false ends."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from po.data.messages import Messages
from po.data.report import Problem
from po.data.rows import Example, Response, Row
from po.data.tokenize import Encoder, Ids, RowFaultError
from po.spec import Overlong

Fate = Literal["kept", "bad", "overlong", "identical", "empty"]


@dataclass(frozen=True)
class Limits:
    """Lengths in tokens. max_length bounds prompt + response for each response by itself."""

    max_length: int
    max_prompt_length: int | None
    overlong: Overlong

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
    notes: list[str] = field(default_factory=list)
    fate: Fate = "kept"

    def least(self) -> int:
        """How many responses the row must keep to be worth anything."""
        return len(self.row.responses) if self.row.is_pair else 2 if self.row.kind == "set" else 1

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
        out = Outcome("kept", length=len(coded.prompt_ids) + max(map(len, coded.response_ids)))
        draft = _Draft(row, coded.prompt_ids, dict(enumerate(coded.response_ids)))
        _drop_empty(draft, encode, out)
        if draft.fate == "kept":
            _fit(draft, encode, limits, out)
    except RowFaultError as e:
        return Outcome("bad", problem=e.problem)
    if draft.fate == "kept":
        _drop_identical(draft, out)
    out.fate = draft.fate
    line = f"{row.where}: {'; '.join(draft.notes)}"
    if out.fate != "kept":
        return replace(out, counts=Counter(), lines={out.fate: line})  # its responses are not counted one by one
    _keep(draft, encode, out)
    if draft.notes:
        out.note("cut", line)
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
        room = limits.max_length - len(draft.prompt_ids)
        if long:
            draft.notes.append(f"{_named(draft, long)}, cut to {room}")
        for k in long:
            draft.response_ids[k] = draft.response_ids[k][:room]
        out.counts["responses_cut"] += len(long)
    else:  # drop; error too, which the caller raises for all rows at once
        _drop_long(draft, long, limits.max_length - len(draft.prompt_ids), out)


def _named(draft: _Draft, ks: Sequence[int]) -> str:
    """'responses[1] of 1200 tokens', or 'responses[1, 3, 4] of 700 to 1200 tokens'."""
    lengths = sorted({len(draft.response_ids[k]) for k in ks})
    return (
        f"responses[{', '.join(map(str, ks))}] of {' to '.join(map(str, lengths[:: max(1, len(lengths) - 1)]))} tokens"
    )


def _drop_long(draft: _Draft, long: Sequence[int], room: int, out: Outcome) -> None:
    if long:
        draft.notes.append(f"{_named(draft, long)}, room is {room}")
    draft.drop(long, "overlong")
    out.counts["responses_overlong"] += len(long)


def _cut_prompt(draft: _Draft, encode: Encoder, limits: Limits, out: Outcome) -> None:
    """Shorten the prompt from the left until its longest response fits. A response that does not fit behind the
    shortest possible prompt goes as under `drop`."""
    least = _least_prompt(draft, encode)
    if least > limits.prompt_room():
        draft.fate = "overlong"
        draft.notes.append(f"the prompt cannot be cut below {least} tokens, room is {limits.prompt_room()}")
        return
    room = limits.max_length - least
    _drop_long(draft, [k for k, ids in draft.response_ids.items() if len(ids) > room], room, out)
    if draft.fate != "kept":
        return
    room = min(limits.prompt_room(), limits.max_length - max(map(len, draft.response_ids.values())))
    if len(draft.prompt_ids) > room:
        before = len(draft.prompt_ids)
        _cut_prompt_to(draft, encode, room)
        draft.notes.append(f"prompt cut from {before} to {len(draft.prompt_ids)} tokens")
        out.counts["prompts_cut"] += 1


def _least_prompt(draft: _Draft, encode: Encoder) -> int:
    """Tokens of the shortest prompt: BOS and one token of text, or the system message and the last user turn."""
    if isinstance(draft.row.prompt, str):
        return min(len(encode.lead) + 1, len(draft.prompt_ids))
    starts = _later_turns(draft.row.prompt)
    return len(encode(_from_turn(draft.row, starts[-1])).prompt_ids) if starts else len(draft.prompt_ids)


def _cut_prompt_to(draft: _Draft, encode: Encoder, room: int) -> None:
    """Text: BOS and the last tokens. Messages: without the oldest turns, rendered anew, so the header stays whole."""
    if isinstance(draft.row.prompt, str):
        lead = encode.lead if draft.prompt_ids[: len(encode.lead)] == encode.lead else ()
        draft.prompt_ids = lead + draft.prompt_ids[len(draft.prompt_ids) - (room - len(lead)) :]
        return
    for start in _later_turns(draft.row.prompt):
        coded = encode(_from_turn(draft.row, start))
        if len(coded.prompt_ids) <= room:
            draft.prompt_ids = coded.prompt_ids
            draft.response_ids = {k: coded.response_ids[k] for k in draft.response_ids}
            return
    raise AssertionError("the last turn alone was found to fit")


def _later_turns(prompt: Messages) -> list[int]:
    """Where each user turn but the first begins."""
    return [i for i, m in enumerate(prompt) if m["role"] == "user"][1:]


def _from_turn(row: Row, start: int) -> Row:
    head = tuple(itertools.takewhile(lambda m: m["role"] in ("system", "developer"), _talk(row)))
    return replace(row, prompt=(*head, *_talk(row)[start:]))


def _talk(row: Row) -> Messages:
    assert not isinstance(row.prompt, str)
    return row.prompt


def _drop_empty(draft: _Draft, encode: Encoder, out: Outcome) -> None:
    nothing = ((), (encode.eos,)) if isinstance(draft.row.prompt, str) else ((),)
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


def _keep(draft: _Draft, encode: Encoder, out: Outcome) -> None:
    row, ks = draft.row, list(draft.response_ids)
    ids = tuple(draft.response_ids.values())
    chosen = [row.responses[k] for k in ks]
    reward = tuple(r.reward for r in chosen if r.reward is not None)
    label = (1, -1) if row.is_pair else tuple(r.label for r in chosen if r.label is not None)
    logps = tuple(r.logps[: len(i)] for r, i in zip(chosen, ids) if r.logps is not None)
    out.example = Example(
        row.id,
        row.where,
        draft.prompt_ids,
        ids,
        reward if len(reward) == len(ks) else None,
        label if len(label) == len(ks) else None,
        logps if len(logps) == len(ks) else None,
        row.is_pair,
        tuple(row.columns.items()),
        _all([r.embedding for r in chosen]),
        row.prompt_embedding,
        *(_of_teacher(name, chosen, ids) for name in ("ids", "logps", "ref_logps")),
    )
    out.counts["responses_kept"] += len(ks)
    out.counts["responses_stop"] += sum(map(encode.stops_at_end, ids))


def _all(values: Sequence[Any]) -> Any:
    """The values, or None where one is missing."""
    return None if any(v is None for v in values) else tuple(values)


def _of_teacher(name: str, responses: Sequence[Response], ids: Sequence[Ids]) -> Any:
    """A part of each response's teacher, as long as the response is now."""
    parts = [getattr(r.teacher, name, None) for r in responses]
    return _all([part and part[: len(i)] for part, i in zip(parts, ids)])
