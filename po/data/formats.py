"""Any of the field's record formats -> the one Row. Detected by the fields that are there, record by record.

TRL (standard, conversational, implicit prompt, tools, unpaired), sets of scored or ranked responses, NeMo,
UltraFeedback, LLaMA-Factory, ms-swift, axolotl, HH-RLHF. docs/data.md has one example of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from po.data import beside, extras, facts, online
from po.data.privileged import FIELD, read_privileged
from po.data.prompts import PROMPTS, alone, find_prompt, join
from po.data.read import Record
from po.data.report import NOTHING, Faults, Problem, Say
from po.data.rows import Response, Row
from po.data.view import Candidate, View
from po.data.wanted import NOTHING_MORE, Wanted
from po.errors import UserError, suggest
from po.spec import Source

CHOSEN = ("chosen", "chosen_response")
REJECTED = ("rejected", "rejected_response", "rejected_messages")
_SIDES = (*CHOSEN, *REJECTED)
SET = ("responses", "completions", "answers")
ONE = ("completion", "response", "output", "answer")
REWARDS = ("rewards", "scores", "reward", "score")
RANKS = ("ranks", "rank")
LABELS = ("label", "labels", "kto_tag")
UNSUPPORTED = ("images", "image", "videos", "audios", "rejected_images")
OTHERS = ("id", "system", "history", "tools", "chat_template_kwargs", "prompt_ids", "tokenizer")
PAIR_SCORES = tuple(p.format(s) for s in ("score", "reward", "rating") for p in ("{}_{{}}", "{{}}_{}", "{{}}-{}"))
_SCORED = tuple(pattern.format(side) for pattern in PAIR_SCORES for side in ("chosen", "rejected"))
KNOWN = (*PROMPTS, *CHOSEN, *REJECTED, *SET, *ONE, *REWARDS, *RANKS, *LABELS, *OTHERS, *_SCORED)
_EXTRAS = {
    "embedding": ("embedding", "embeddings", "chosen_embedding", "rejected_embedding"),
    "teacher": ("teacher", "teachers", "chosen_teacher", "rejected_teacher"),
    "logps": ("logps", "chosen_logps", "rejected_logps"),
    "prompt_embedding": ("prompt_embedding",),
    "privileged": (FIELD,),
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
    patterns = ("{}", "{}s", "chosen_{}", "rejected_{}")
    known = [*KNOWN, *wanted.columns, *(p.format(n) for n in wanted.of_responses for p in patterns)]
    known += (n for fact, names in _EXTRAS.items() if getattr(wanted, fact) for n in names)
    for ours in source.columns:
        if ours not in known:
            near = suggest(ours, known)
            raise UserError(f"{source.path}: columns: {ours!r} is no field that po reads (write ours: theirs).{near}")


def convert(record: Record, source: Source, wanted: Wanted = NOTHING_MORE) -> Converted:
    """One record to one Row; every problem of the record is collected, none raised."""
    if record.data is None:
        return Converted(None, (record.problem,) if record.problem else (), "unreadable", ())
    faults = Faults(record.where)
    view = View(beside.renamed(record.data, source.columns, faults), source, faults, wanted=wanted)
    for name in UNSUPPORTED:
        if view.get(name):
            faults.add(name, "no images, sound or video (po trains on text)", view.data[name])
    row = _row(view, record)
    name = ", ".join(dict.fromkeys(view.notes)) or "unknown"
    unread = () if wanted.prompts else view.data
    unused = tuple(k for k in unread if k not in view.used and view.data[k] is not None)
    return Converted(None if faults.found else row, tuple(faults.found), name, unused)


def _row(view: View, record: Record) -> Row | None:
    faults, where, prompts = view.faults, record.where, view.wanted.prompts
    chosen_first = any(view.data.get(n) is not None for n in _SIDES) if prompts else view.has(_SIDES)
    candidates = _candidates(view, chosen_first)
    prompt = find_prompt(view, candidates)
    tools, kwargs, row_id = beside.tools(view), beside.template_kwargs(view), beside.row_id(view, where)
    made = _facts(view, candidates, chosen_first)
    sampled = beside.sampled(view, candidates)
    prompt_embedding, columns = extras.read_prompt_embedding(view), extras.read_columns(view)
    free = chosen_first or prompts or view.wanted.unscored
    lacking = not free and len(candidates) > 1 and not faults.found
    if lacking and made[0]["reward"] is None and made[0]["label"] is None:
        faults.add(view.notes[1], "a reward, a rank or a label on every response", Say("none"))
    if any(c.rank is not None for c in candidates) and not any(c.reward is not None for c in candidates):
        view.notes.append("ranks")
    joined = alone(view, prompt) if prompts and not candidates else join(view, prompt, candidates)
    privileged = read_privileged(view, prompt, joined[0]) if joined else None
    if not sampled and not prompts:  # a sampler may repeat itself
        _different(view, candidates, joined[1] if joined else [c.value for c in candidates])
    if joined is None or faults.found:
        return None
    responses = tuple(Response(content, **one) for content, one in zip(joined[1], made))
    if prompts:
        sampled["record"] = online.as_record(record.data or {}, view.data, joined[0])
    meta = {k: v for k, v in view.data.items() if k not in view.used}
    return Row(
        row_id,
        where,
        joined[0],
        responses,
        tools,
        kwargs,
        meta,
        chosen_first,
        prompt_embedding,
        columns,
        privileged=privileged,
        **sampled,
    )


def _candidates(view: View, chosen_first: bool) -> list[Candidate]:
    """The responses that the record holds, unchecked."""
    if chosen_first:
        return _pair(view)
    if view.wanted.prompts:
        view.notes.append("prompt")
        candidates = online.own_responses(view)
        online.scored(view, candidates, REWARDS, LABELS)
        return candidates
    return _set(view) if view.has(SET) else _single(view)


def _facts(view: View, candidates: Sequence[Candidate], chosen_first: bool) -> list[dict[str, Any]]:
    """What is said about each response, by the names of Response's fields."""
    faults = view.faults
    scored = facts.rewards(candidates, view.source.rank_order, faults) if candidates else []
    labelled = facts.labels(candidates, faults) if candidates and not chosen_first else [None] * len(candidates)
    logps = [facts.logps(c, faults) for c in candidates]
    facts.complete(candidates, "logps", "the sampler's log-probs", faults)
    facts.complete(candidates, "token_ids", "token ids", faults)
    lists = {
        "reward": scored,
        "label": labelled,
        "logps": logps,
        "source": [None if c.source is None else str(c.source) for c in candidates],
        "embedding": extras.read_embeddings(candidates, faults),
        "teacher": extras.read_teachers(candidates, faults),
        "token_ids": [beside.token_ids(c.token_ids, c.at("token_ids"), faults) for c in candidates],
        **extras.read_of_responses(view, candidates),
        "ended": [beside.ended(c, faults) for c in candidates],
    }
    return [dict(zip(lists, one)) for one in zip(*lists.values())]


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
    for pattern in () if view.wanted.prompts else PAIR_SCORES:
        scores = [pattern.format(side) for side in ("chosen", "rejected")]
        if any(view.data.get(n) is not None for n in scores):
            for c, n in zip(sides, scores):
                c.reward, c.fields = view.get(n), {"reward": n}
            view.notes.append("rewards")
            break
    if not view.wanted.prompts:
        extras.attach(view, sides, "{}_{}", ("chosen", "rejected"))
    return sides


def _set(view: View) -> list[Candidate]:
    """K responses under one name."""
    name = next(n for n in SET if n in view.data)
    view.notes += ["set", name]
    value = view.get(name)
    if not isinstance(value, list | tuple):
        view.faults.add(name, "a list of responses", value)
        return []
    candidates = facts.listed(name, value, view.wanted)
    lists = [("reward", REWARDS), ("rank", RANKS), ("label", LABELS)]
    lists += [(fact, (name,)) for fact, name in extras.BESIDE.items() if getattr(view.wanted, fact)]
    for fact, names in lists:
        found = view.first(names)
        if found:
            facts.parallel(candidates, fact, *found, view)
    extras.attach_lists(view, candidates)
    if "context" in view.data:
        view.notes.append("NeMo")
    if any(c.at("reward").endswith("overall_score") for c in candidates):
        view.notes.append("UltraFeedback")
    said = ("label", "reward", "rank") if view.wanted.single else ("label",)
    enough = view.wanted.unscored or any(getattr(c, fact) is not None for c in candidates for fact in said)
    if len(candidates) < (1 if enough else 2):
        with_it = "a reward or a label" if view.wanted.single else "a label"
        view.faults.add(name, f"at least two responses, or one with {with_it}", value)
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
