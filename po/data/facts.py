"""What a row says about its responses: rewards, ranks, labels, the sampler's log-probs. All of them or none."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from po.data.messages import is_message
from po.data.report import NOTHING, Faults, Say, describe
from po.data.view import Candidate, View
from po.data.wanted import Wanted
from po.spec import RankOrder

CONTENT = ("content", "response", "text", "completion", "answer")
SCORE = ("reward", "score", "overall_score")
_NAMED = ("rank", "label", "logps", "embedding", "teacher", "token_ids", "ended")
UNLABELLED = Say("null")  # a label that is null where heads take unlabelled responses
NO_ORDER = "rank_order in the recipe's source: lower_is_better or higher_is_better"


def from_object(data: Mapping[str, Any], field: str, wanted: Wanted) -> Candidate:
    """A response written as an object: its content under any of CONTENT, its reward under any of SCORE or, as in
    UltraFeedback, under annotations.overall_score."""
    content = next((k for k in CONTENT if data.get(k) is not None), "content")
    score = next((k for k in SCORE if data.get(k) is not None), None)
    notes = data.get("annotations")
    reward, at = (data[score], score) if score else (None, "reward")
    if score is None and isinstance(notes, dict) and notes.get("overall_score") is not None:
        reward, at = notes["overall_score"], "annotations.overall_score"
    return Candidate(
        f"{field}.{content}",
        data.get(content, NOTHING),
        reward,
        data.get("rank"),
        label(data.get("label", NOTHING), wanted),
        data.get("logps"),
        data.get("model", data.get("source", data.get("sampler"))),
        data.get("embedding") if wanted.embedding else None,
        data.get("teacher") if wanted.teacher else None,
        data.get("token_ids"),
        data.get("ended"),
        {name: data[name] for name in wanted.of_responses if data.get(name) is not None},
        {"reward": f"{field}.{at}"} | {name: f"{field}.{name}" for name in (*_NAMED, *wanted.of_responses)},
    )


def listed(name: str, values: Sequence[Any], wanted: Wanted) -> list[Candidate]:
    """The responses of a list: texts, lists of messages, or objects that carry their own reward, rank or label."""
    found = []
    for k, v in enumerate(values):
        plain = not isinstance(v, dict) or is_message(v)
        found.append(Candidate(f"{name}[{k}]", v) if plain else from_object(v, f"{name}[{k}]", wanted))
    return found


def label(value: object, wanted: Wanted) -> object:
    """What the record says: None for nothing, UNLABELLED for a null that is written where heads want to know."""
    if value is None and wanted.unlabelled:
        return UNLABELLED
    return None if value is NOTHING else value


def number(value: object, field: str, faults: Faults) -> float | None:
    """A finite number; true, '7.5', NaN and infinity are none."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            if math.isfinite(float(value)):
                return float(value)
        except OverflowError:
            value = Say("an integer too large for a float")
    faults.add(field, "a finite number", value)
    return None


def sign(value: object, field: str, faults: Faults) -> int | None:
    """A label: +1 for true or 1, -1 for false, 0 or -1."""
    if isinstance(value, bool) or (isinstance(value, int | float) and value in (-1, 0, 1)):
        return 1 if value > 0 else -1
    faults.add(field, "true or false", value)
    return None


def complete(candidates: Sequence[Candidate], fact: str, expected: str, faults: Faults) -> bool:
    """Whether every response has the fact; a fault for each that lacks what others of the row have."""
    has = [getattr(c, fact) is not None for c in candidates]
    for c, there in zip(candidates, has):
        if any(has) and not there:
            faults.add(c.at(fact), f"{expected}, as on the row's other responses", NOTHING)
    return all(has)


def rewards(candidates: Sequence[Candidate], order: RankOrder | None, faults: Faults) -> list[float | None]:
    """A reward for each response, from rewards or else from ranks, higher is better; all None where there are none."""
    none: list[float | None] = [None] * len(candidates)
    if any(c.reward is not None for c in candidates):
        if not complete(candidates, "reward", "a number", faults):
            return none
        return [number(c.reward, c.at("reward"), faults) for c in candidates]
    if not complete(candidates, "rank", "a rank", faults):
        return none
    ranks = [number(c.rank, c.at("rank"), faults) for c in candidates]
    if order is None:
        faults.add(candidates[0].at("rank"), NO_ORDER, Say("a rank without a direction"))
    sign = -1 if order == "lower_is_better" else 1
    return [None if r is None else sign * r for r in ranks]


def labels(candidates: Sequence[Candidate], faults: Faults) -> list[int | None]:
    """+1, -1 or 0 (unlabelled) for each response, or all None."""
    if not complete(candidates, "label", "true or false", faults):
        return [None] * len(candidates)
    return [0 if c.label is UNLABELLED else sign(c.label, c.at("label"), faults) for c in candidates]


def logps(candidate: Candidate, faults: Faults) -> tuple[float, ...] | None:
    """The sampler's log-prob of each token of a response: finite numbers, at most 0."""
    if candidate.logps is None:
        return None
    if not isinstance(candidate.logps, list | tuple):
        faults.add(candidate.at("logps"), "a list of numbers, one per token", candidate.logps)
        return None
    out = [number(x, f"{candidate.at('logps')}[{t}]", faults) for t, x in enumerate(candidate.logps)]
    return tuple(x for x in out if x is not None)


def check_parallel(candidates: Sequence[Candidate], name: str, values: object, faults: Faults) -> bool:
    """Whether a list beside the responses has an entry for each, else a fault."""
    fits = isinstance(values, list | tuple) and len(values) == len(candidates)
    if not fits:
        faults.add(name, f"a list of {len(candidates)}, one per response", Say(describe(values)))
    return fits


def parallel(candidates: Sequence[Candidate], fact: str, name: str, values: Any, view: View) -> None:
    """Give each response its entry of a list beside the responses, e.g. `rewards`; a null entry is nothing said."""
    if not check_parallel(candidates, name, values, view.faults):
        return
    for k, (c, value) in enumerate(zip(candidates, values)):
        setattr(c, fact, label(value, view.wanted) if fact == "label" else value)
        c.fields = {**c.fields, fact: f"{name}[{k}]"}
