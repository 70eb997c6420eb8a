"""Any of the field's record formats -> the one Row. Detected by the fields that are there, record by record.

TRL (standard, conversational, implicit prompt, tools, unpaired), sets of scored or ranked responses, NeMo,
UltraFeedback, LLaMA-Factory, ms-swift, axolotl, HH-RLHF. docs/data.md has one example of each.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from po.data import extras, facts
from po.data.messages import is_message
from po.data.prompts import PROMPTS, find_prompt, join
from po.data.read import Record
from po.data.report import NOTHING, Faults, Problem, Say
from po.data.rows import Response, Row
from po.data.view import Candidate, View
from po.data.wanted import NOTHING_MORE, Wanted
from po.errors import UserError, suggest
from po.spec import Source

CHOSEN = ("chosen", "chosen_response")
REJECTED = ("rejected", "rejected_response", "rejected_messages")
SET = ("responses", "completions", "answers")
ONE = ("completion", "response", "output", "answer")
REWARDS = ("rewards", "scores", "reward", "score")
RANKS = ("ranks", "rank")
LABELS = ("label", "labels", "kto_tag")
UNSUPPORTED = ("images", "image", "videos", "audios", "rejected_images")
OTHERS = ("id", "system", "history", "tools", "chat_template_kwargs")
PAIR_SCORES = tuple(p.format(s) for s in ("score", "reward", "rating") for p in ("{}_{{}}", "{{}}_{}", "{{}}-{}"))
_SCORED = tuple(pattern.format(side) for pattern in PAIR_SCORES for side in ("chosen", "rejected"))
KNOWN = (*PROMPTS, *CHOSEN, *REJECTED, *SET, *ONE, *REWARDS, *RANKS, *LABELS, *OTHERS, *_SCORED)
_EXTRAS = {
    "embedding": ("embedding", "embeddings", "chosen_embedding", "rejected_embedding"),
    "teacher": ("teacher", "teachers", "chosen_teacher", "rejected_teacher"),
    "logps": ("logps", "chosen_logps", "rejected_logps"),
    "prompt_embedding": ("prompt_embedding",),
}
_EXPECTED = "chosen and rejected, responses with rewards, completion with label, or messages"


@dataclass(frozen=True)
class Converted:
    """A record's row, or its problems; the name of the format; the columns that nothing read."""

    row: Row | None
    problems: tuple[Problem, ...]
    format: str
    unused: tuple[str, ...]


def check_columns(source: Source, wanted: Wanted = NOTHING_MORE) -> None:
    """Raises UserError where `columns` names a field that neither a format has nor a head wants."""
    known = [*KNOWN, *wanted.columns, *(n for fact, names in _EXTRAS.items() if getattr(wanted, fact) for n in names)]
    for ours in source.columns:
        if ours not in known:
            near = suggest(ours, known)
            raise UserError(f"{source.path}: columns: {ours!r} is no field that po reads (write ours: theirs).{near}")


def convert(record: Record, source: Source, wanted: Wanted = NOTHING_MORE) -> Converted:
    """One record to one Row; every problem of the record is collected, none raised."""
    if record.data is None:
        return Converted(None, (record.problem,) if record.problem else (), "unreadable", ())
    faults = Faults(record.where)
    view = View(_renamed(record.data, source.columns, faults), source, faults, wanted=wanted)
    for name in UNSUPPORTED:
        if view.get(name):
            faults.add(name, "no images, sound or video (po trains on text)", view.data[name])
    row = _row(view, record.where)
    name = ", ".join(dict.fromkeys(view.notes)) or "unknown"
    unused = tuple(k for k in view.data if k not in view.used and view.data[k] is not None)
    return Converted(None if faults.found else row, tuple(faults.found), name, unused)


def _row(view: View, where: str) -> Row | None:
    faults = view.faults
    chosen_first = view.has(CHOSEN) or view.has(REJECTED)
    if chosen_first:
        candidates = _pair(view)
    elif view.has(SET):
        candidates = _set(view)
    else:
        candidates = _single(view)
    prompt = find_prompt(view, candidates)
    tools, kwargs, row_id = _tools(view), _kwargs(view), _id(view, where)
    scored = facts.rewards(candidates, view.source.rank_order, faults) if candidates else []
    labelled = facts.labels(candidates, faults) if candidates and not chosen_first else [None] * len(candidates)
    logps = [facts.logps(c, faults) for c in candidates]
    facts.complete(candidates, "logps", "the sampler's log-probs", faults)
    embeddings, teachers = extras.read_embeddings(candidates, faults), extras.read_teachers(candidates, faults)
    prompt_embedding, columns = extras.read_prompt_embedding(view), extras.read_columns(view)
    if not chosen_first and len(candidates) > 1 and not faults.found and scored[0] is None and labelled[0] is None:
        faults.add(view.notes[1], "a reward, a rank or a label on every response", Say("none"))
    if any(c.rank is not None for c in candidates) and not any(c.reward is not None for c in candidates):
        view.notes.append("ranks")
    joined = join(view, prompt, candidates)
    _different(view, candidates, joined[1] if joined else [c.value for c in candidates])
    if joined is None or faults.found:
        return None
    writers = [None if c.source is None else str(c.source) for c in candidates]
    made = zip(joined[1], scored, labelled, logps, writers, embeddings, teachers)
    responses = tuple(Response(*facts_of_one) for facts_of_one in made)
    meta = {k: v for k, v in view.data.items() if k not in view.used}
    return Row(row_id, where, joined[0], responses, tools, kwargs, meta, chosen_first, prompt_embedding, columns)


def _different(view: View, candidates: Sequence[Candidate], contents: Sequence[object]) -> None:
    if len(contents) > 1 and contents[0] and all(c == contents[0] for c in contents):
        found = f"the same as {'chosen' if view.notes[0] == 'preference' else 'every other response'}"
        view.faults.add(candidates[-1].field, "a different response", Say(found))


def _pair(view: View) -> list[Candidate]:
    """chosen and rejected; in ms-swift's format the chosen response ends `messages`."""
    view.notes.append("preference")
    sides = []
    for side, names in (("chosen", CHOSEN), ("rejected", REJECTED)):
        name, value = view.first(names) or (side, None)
        if name in ("chosen_response",):
            view.notes.append("axolotl")
        sides.append(Candidate(name, value))
    if sides[0].value is None and not view.has(CHOSEN):
        found = view.first(("messages", "conversations"))
        if found:
            view.notes.append("ms-swift")
            sides[0] = Candidate(*found)
    for c in sides:
        if c.value is None:
            c.value = None if c.field in view.data else NOTHING
    for pattern in PAIR_SCORES:
        scores = [pattern.format(side) for side in ("chosen", "rejected")]
        if any(view.data.get(n) is not None for n in scores):
            for c, n in zip(sides, scores):
                c.reward, c.fields = view.get(n), {"reward": n}
            view.notes.append("rewards")
            break
    extras.attach(view, sides, "{}_{}", ("chosen", "rejected"))
    return sides


def _set(view: View) -> list[Candidate]:
    """K responses under one name: texts, lists of messages, or objects that carry their own reward, rank or label."""
    name = next(n for n in SET if n in view.data)
    view.notes += ["set", name]
    value = view.get(name)
    if not isinstance(value, list | tuple):
        view.faults.add(name, "a list of responses", value)
        return []
    candidates = []
    for k, v in enumerate(value):
        plain = not isinstance(v, dict) or is_message(v)
        candidates.append(Candidate(f"{name}[{k}]", v) if plain else facts.from_object(v, f"{name}[{k}]", view.wanted))
    beside = [("reward", REWARDS), ("rank", RANKS), ("label", LABELS)]
    beside += [(fact, (name,)) for fact, name in extras.BESIDE.items() if getattr(view.wanted, fact)]
    for fact, names in beside:
        found = view.first(names)
        if found:
            facts.parallel(candidates, fact, *found, view)
    if "context" in view.data:
        view.notes.append("NeMo")
    if any(c.at("reward").endswith("overall_score") for c in candidates):
        view.notes.append("UltraFeedback")
    if len(candidates) < 2 and not (candidates and candidates[0].label is not None):
        view.faults.add(name, "at least two responses, or one with a label", value)
    return candidates


def _single(view: View) -> list[Candidate]:
    """One response, with a label (unpaired) or without (a demonstration)."""
    found = view.first(ONE) or view.first(("messages", "conversations"))
    label, reward = view.first(LABELS), view.first(REWARDS)
    if label is None and view.has(LABELS):
        name = next(k for k in LABELS if k in view.data)
        if view.wanted.unlabelled:
            label = (name, facts.UNLABELLED)
            view.used.add(name)
        else:
            view.faults.add(name, "true or false", None)
    if found is None:
        there = [k for k in ONE if k in view.data]
        got = Say("null") if there else Say("fields " + (", ".join(map(str, list(view.data)[:8])) or "none"))
        view.faults.add(there[0] if there else "", "text or messages" if there else _EXPECTED, got)
        return []
    view.notes.append("demonstration" if label is None else "unpaired")
    one = Candidate(*found, label=label and label[1], reward=reward and reward[1])
    one.fields = {"label": label[0] if label else "label", "reward": reward[0] if reward else "reward"}
    extras.attach(view, [one], "{1}", [""])
    return [one]


def _renamed(data: Mapping[str, Any], columns: Mapping[str, str], faults: Faults) -> dict[str, Any]:
    out = {k: v for k, v in data.items() if k not in columns.values()}
    for ours, theirs in columns.items():
        if theirs in data:
            out[ours] = data[theirs]
        else:
            faults.add(theirs, f"a column (the recipe's `columns` reads {ours} from it)", NOTHING)
    return out


def _id(view: View, where: str) -> str:
    value = view.get("id")
    if value is None:
        return where
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        view.faults.add("id", "text or an integer", value)
    return str(value)


def _tools(view: View) -> tuple[Any, ...] | None:
    value = view.get("tools")
    if isinstance(value, str) and value:
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            view.faults.add("tools", "a list of objects, or JSON text of one", value)
            return None
    if not value:
        return None
    if not isinstance(value, list | tuple) or not all(isinstance(t, dict) for t in value):
        view.faults.add("tools", "a list of objects, or JSON text of one", value)
        return None
    return tuple(value)


def _kwargs(view: View) -> Mapping[str, Any]:
    value = view.get("chat_template_kwargs")
    if value is None or isinstance(value, dict):
        return value or {}
    view.faults.add("chat_template_kwargs", "an object", value)
    return {}
