"""Other people's preference data -> po's rows. Formats are told by the fields that are there, or named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from po.data import beside
from po.data.formats import convert
from po.data.messages import ASSISTANT, HUMAN
from po.data.read import Record
from po.data.report import Faults, Problem, Say
from po.data.rows import Row
from po.data.sources import Opened
from po.errors import UserError
from po.prep import human, ultrafeedback
from po.prep.formats import BY_NAME, ROWS, find_format
from po.prep.reading import Choices, Format, Made, Reading
from po.prep.rows import WANTED, as_json
from po.prep.step import Outcome
from po.spec import Source

_LOOK = 64  # records read to say what a file is


@dataclass(frozen=True)
class Found:
    """What the first records of a source are."""

    name: str
    formats: Mapping[str, int]
    kind: str = ""  # what po.data calls the first that is of no other format

    def line(self, given: Format | None) -> str:
        """What is printed before the work begins."""
        total = sum(self.formats.values())
        if given is not None:
            return f"{self.name}: read as {given.name}, as told"
        if not total:
            return f"{self.name}: none of the first rows can be read"
        names = {f: f"{f} ({self.kind if f == ROWS.name else BY_NAME[f].fields})" for f in self.formats}
        said = ", ".join(f"{n} of them {names[f]}" for f, n in self.formats.items())
        if len(self.formats) == 1:
            return f"{self.name}: recognised as {next(iter(names.values()))}, by the first {total} rows"
        return f"{self.name}: several formats in the first {total} rows: {said}"


def look(one: Opened, given: Format | None) -> Found:
    """Look at the first records. Raises UserError where ranks come without a direction, or formats cannot be mixed."""
    records = [r for r in islice(one.records(), _LOOK) if r.data is not None]
    first = [beside.renamed(r.data or {}, one.source.columns, Faults(r.where)) for r in records]
    found = Counter((given or find_format(data)).name for data in first)
    plain = next((d for d in first if find_format(d) is ROWS), None)
    kind = convert(Record("", plain), replace(one.source, columns={}), WANTED).format if plain else ""
    name = one.names[0] if len(one.names) == 1 else one.source.path
    unscored = [d for d in first if BY_NAME[(given or find_format(d)).name].ranked and not _scored(d)]
    if unscored and one.source.rank_order is None:
        raise UserError(
            f"{name}: its responses have ranks (as {next(iter(found))} has) and no scores. Say which end is the best: "
            "--rank-order lower_is_better (1 is the best) or higher_is_better"
        )
    if "helpsteer" in found and len(found) > 1:
        raise UserError(
            f"{name}: some of its first rows are helpsteer, others {', '.join(f for f in found if f != 'helpsteer')}. "
            "Rows of helpsteer are joined with their neighbours; convert the others by themselves, or name a --format"
        )
    return Found(name, found, kind)


def _scored(data: Mapping[str, Any]) -> bool:
    listed = next((data[n] for n in ("answers", "completions") if isinstance(data.get(n), list)), ())
    return any(isinstance(c, dict) and c.get("reward", c.get("score")) is not None for c in listed) or "rewards" in data


@dataclass(frozen=True)
class Convert:
    """The work of convert.py on one record. Its source is the one that the record came from, so one per source."""

    source: Source
    choices: Choices
    given: Format | None = None
    chat: bool = False  # plain prompts become messages, Human: and Assistant: turns one each
    template: str | None = None  # around plain prompts; {prompt} is where they go

    def __call__(self, record: Record) -> Outcome:
        """One record to its rows in po's form."""
        data, faults = self._fields(record)
        form = self.given or find_format(data)
        if faults.found:
            return Outcome(problem=faults.found)
        reading = Reading(data, self.choices, faults)
        if form.name != "ultrafeedback" and self.choices.rule != "sets":
            ultrafeedback.wrong_rule(reading)
        elif self.given is not None and not form.detect(data):
            faults.add("", f"{form.name} ({form.fields})", Say("fields " + ", ".join(map(str, list(data)[:8]))))
        made: Made = [] if faults.found else form.read(reading) if form.read else [dict(data)]
        return self._outcome(record, reading, form, made)

    def together(self, records: list[Record]) -> list[Outcome]:
        """HelpSteer: adjacent rows of one prompt to one set. The first row gets it, the others are joined into it."""
        read = [self._fields(r) for r in records]
        bad = {k: faults for k, (_, faults) in enumerate(read) if faults.found}
        form, readings = BY_NAME["helpsteer"], [Reading(d, self.choices, f) for d, f in read]
        for k, reading in enumerate(readings):
            if k not in bad and not form.detect(reading.data):
                got = Say("fields " + ", ".join(map(str, list(reading.data)[:8])))
                reading.faults.add("", f"{form.name} ({form.fields})", got)
        made = [] if any(r.faults.found for r in readings) else human.helpsteer(readings)
        whole = self._outcome(records[0], readings[0], form, made)
        if len(records) == 1:
            return [whole]
        rest = [self._joined(r, records[0]) for r in readings[1:]]
        if whole.problem is None and any(o.problem for o in rest):
            whole = Outcome(dropped="a row of the same prompt is bad")
        return [whole, *rest]

    def _joined(self, reading: Reading, first: Record) -> Outcome:
        return (
            Outcome(problem=reading.faults.found)
            if reading.faults.found
            else Outcome(dropped="joined with the row before")
        )

    def _fields(self, record: Record) -> tuple[dict[str, Any], Faults]:
        faults = Faults(record.where)
        return beside.renamed(record.data or {}, self.source.columns, faults), faults

    def _outcome(self, record: Record, reading: Reading, form: Format, made: Made) -> Outcome:
        if reading.faults.found:
            return Outcome(problem=reading.faults.found)
        sums = {**({} if form is ROWS else {f"format {form.name}": 1}), **reading.counts}
        if isinstance(made, str):
            return Outcome(dropped=made, sums=sums)
        rows: list[dict[str, Any]] = []
        problems: list[Problem] = []
        for k, data in enumerate(made):
            row, name = self._row(record, data, k if len(made) > 1 else None)
            sums |= {f"format {name}": 1} if form is ROWS else {}
            if isinstance(row, dict):
                rows.append(row)
            else:
                problems += row
        return Outcome(problem=problems) if problems else Outcome(tuple(rows), sums=sums)

    def _row(
        self, record: Record, data: Mapping[str, Any], number: int | None
    ) -> tuple[dict[str, Any] | Sequence[Problem], str]:
        """The row or what is wrong with it, and what po.data calls its format."""
        source = Source(self.source.path, rank_order=self.source.rank_order, separator=self.source.separator)
        converted = convert(Record(record.where, dict(data)), source, WANTED)
        if converted.row is None:
            return converted.problems, converted.format
        row = as_json(converted.row, data)
        if number is not None:
            row["id"] = f"{row['id']}#{number}"
        return _dressed(converted.row, row, self.chat, self.template), converted.format


def prompt_key(record: Record) -> object:
    """What adjacent rows of HelpSteer share."""
    return None if record.data is None else str(record.data.get("prompt"))


def _dressed(row: Row, out: dict[str, Any], chat: bool, template: str | None) -> dict[str, Any] | Sequence[Problem]:
    """The row with its plain prompt as messages, or inside a template; conversations and rollouts as they are."""
    if not isinstance(row.prompt, str) or row.prompt_ids is not None:
        return out
    if template is not None:
        return {**out, "prompt": template.replace("{prompt}", row.prompt)}
    if not chat:
        return out
    if not row.prompt.lstrip().startswith(HUMAN.strip()):
        return {**out, "prompt": [{"role": "user", "content": row.prompt}]}
    messages = _turns(row.prompt)
    if messages is None:
        got = Say("turns of the same side in a row, or empty ones")
        return [Problem(row.where, "prompt", "turns of Human: and Assistant: that take turns (--chat)", got)]
    out = {**out, "prompt": messages}
    for name in ("chosen", "rejected", "completion"):
        if isinstance(out.get(name), str):
            out[name] = out[name].strip()
    for one in out.get("responses", ()):
        one["content"] = one["content"].strip()
    return out


def _turns(dialogue: str) -> list[dict[str, str]] | None:
    """The messages of a plain dialogue that ends with Assistant:, or None where the sides do not take turns."""
    parts = ("\n\n" + dialogue.strip()).split(HUMAN)
    messages: list[dict[str, str]] = []
    for part in parts[1:]:
        said, sign, answer = part.partition(ASSISTANT)
        messages.append({"role": "user", "content": said.strip()})
        if sign:
            messages.append({"role": "assistant", "content": answer.strip()})
    ends = bool(messages) and messages[-1] == {"role": "assistant", "content": ""} and not parts[0].strip()
    alternate = all(m["role"] == ("user", "assistant")[i % 2] for i, m in enumerate(messages))
    whole = all(m["content"] and ASSISTANT not in m["content"] for m in messages[:-1])
    return messages[:-1] if ends and alternate and whole else None
