"""UltraFeedback: four responses with ratings of four aspects and an overall score; rules that make pairs of them.

The overall score has a known fault: a critic's 1 was written as 10 for some responses. They are known by an overall
score of 10 beside ratings that lie, on average, below the middle of their scale (3 of 1 to 5).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from po.data.facts import number
from po.data.report import NOTHING, Say
from po.prep.reading import Made, Reading

ASPECTS = ("helpfulness", "honesty", "instruction_following", "truthfulness")
_TRL_MODEL = "gpt-3.5-turbo"


def read(reading: Reading) -> Made:
    """Rows by the rule that was chosen."""
    completions = reading.data["completions"]
    prompt, rule = reading.text("instruction"), reading.choices.rule
    if rule == "trl-unpaired":
        return _unpaired(reading, prompt)
    by_mean = rule == "argilla" or (rule == "sets" and reading.choices.score == "mean")
    kept = []
    for k, one in enumerate(completions):
        score = _mean(one, reading) if by_mean else _overall(one, k, reading)
        if score is not None:
            kept.append({"content": one.get("response"), "reward": score, "source": one.get("model"), **_rest(one)})
    if len(kept) < 2:
        return "fewer than two responses with a score that can be believed"
    rest = reading.rest("instruction", "completions", "models")
    if rule == "sets":
        return [{**rest, "prompt": prompt, "responses": kept}]
    kept.sort(key=lambda r: -r["reward"])  # stable: the first of equal ones is the best
    best, others = kept[0], kept[1:]
    worse = others[-1] if rule == "best-worst" else reading.draw().choice(others)
    if best["reward"] == worse["reward"]:
        return "a tie"
    sides = {"chosen": best, "rejected": worse}
    scores = {f"{side}_reward": one["reward"] for side, one in sides.items()}
    models = {f"{side}_model": one["source"] for side, one in sides.items() if one["source"]}
    return [{**rest, "prompt": prompt, **{s: one["content"] for s, one in sides.items()}, **scores, **models}]


def _rest(one: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in one.items() if k not in ("response", "overall_score", "model")}


def _ratings(one: Mapping[str, Any]) -> list[float]:
    """The ratings that are numbers; one that the annotator did not give is 'N/A'."""
    notes = one.get("annotations")
    found = [notes.get(a) for a in ASPECTS] if isinstance(notes, Mapping) else []
    values = [note.get("Rating", note.get("rating")) if isinstance(note, Mapping) else None for note in found]
    return [float(str(v)) for v in values if _digits(v)]


def _digits(value: object) -> bool:
    return isinstance(value, int | float | str) and str(value).replace(".", "", 1).isdigit()


def _mean(one: Mapping[str, Any], reading: Reading) -> float | None:
    ratings = _ratings(one)
    if not ratings:
        reading.counts["responses left out: no rating"] += 1
        return None
    return sum(ratings) / len(ratings)


def _overall(one: Mapping[str, Any], k: int, reading: Reading) -> float | None:
    notes, at = one.get("annotations"), f"completions[{k}].overall_score"
    inside = notes.get("overall_score") if isinstance(notes, Mapping) else None
    value: Any = one.get("overall_score", NOTHING if inside is None else inside)
    score = number(float(value) if isinstance(value, str) and _digits(value) else value, at, reading.faults)
    ratings = _ratings(one)
    if score != 10 or not ratings or sum(ratings) / len(ratings) >= 3:
        return score
    bug = reading.choices.score_bug
    done = {"drop": "responses left out", "as-one": "responses given a score of 1", "keep": "responses kept"}[bug]
    reading.counts[f"{done}: scored 10 with ratings below 3 (known fault)"] += 1
    return {"drop": None, "as-one": 1.0, "keep": score}[bug]


def _unpaired(reading: Reading, prompt: str | None) -> Made:
    """TRL's unpaired rows: one model's response, desirable where its helpfulness was rated 5 of 5."""
    for one in reading.data["completions"]:
        if one.get("model") == _TRL_MODEL:
            notes = one.get("annotations")
            note = notes.get("helpfulness") if isinstance(notes, Mapping) else None
            value = note.get("Rating") if isinstance(note, Mapping) else None
            if not _digits(value):
                return "no rating of helpfulness"
            rest = reading.rest("instruction", "completions", "models")
            label = float(str(value)) >= 5
            return [{**rest, "prompt": prompt, "completion": one.get("response"), "label": label, "model": _TRL_MODEL}]
    return f"no response of {_TRL_MODEL}"


def detect(data: Mapping[str, Any]) -> bool:
    """A set with UltraFeedback's annotations."""
    found = data.get("completions")
    return (
        isinstance(data.get("instruction"), str)
        and isinstance(found, list)
        and bool(found)
        and all(isinstance(one, dict) and "response" in one and "annotations" in one for one in found)
    )


def wrong_rule(reading: Reading) -> None:
    """A rule that was asked for, and a record that it is not for."""
    want = f"an UltraFeedback record (--rule {reading.choices.rule} is for these)"
    reading.faults.add("", want, Say("another format"))
