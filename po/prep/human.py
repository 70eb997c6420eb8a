"""What people preferred: HelpSteer 1 to 3, SHP, Arena votes, thumbs; and solutions with a verdict."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from po.data.messages import is_message
from po.data.report import NOTHING, Say
from po.prep.reading import Made, Reading

HELPSTEER = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
_UP = {"up", "thumbs_up", "thumbsup", "like", "liked", "positive", "good", "1", "+1", "true", "\U0001f44d"}
_DOWN = {"down", "thumbs_down", "thumbsdown", "dislike", "disliked", "negative", "bad", "0", "-1", "false"}
_DOWN.add("\U0001f44e")
THUMBS = ("feedback", "thumbs", "thumb", "vote", "rating", "reaction")


def of_pair(reading: Reading, prompt: Any, sides: Sequence[Any], first: bool, rest: Mapping[str, Any]) -> Made:
    """A pair of two responses of which the first or the second was preferred."""
    chosen, rejected = sides if first else sides[::-1]
    return [{**rest, "prompt": prompt, "chosen": chosen, "rejected": rejected}]


def helpsteer(readings: Sequence[Reading]) -> Made:
    """HelpSteer 1 and 2: adjacent rows of one prompt are one set; the reward is the attribute that was chosen."""
    first, name = readings[0], readings[0].choices.attribute
    responses = []
    for one in readings:
        rated = {k: v for k, v in one.data.items() if k not in ("prompt", "id")}
        content, reward = rated.pop("response", NOTHING), one.number(name)
        responses.append({"content": content, "reward": reward, **rated})
    if len(responses) < 2:
        return "no second response to its prompt beside it"
    own = {"id": first.data["id"]} if "id" in first.data else {}
    return [{**own, "prompt": first.text("prompt"), "responses": responses}]


def helpsteer_pair(reading: Reading) -> Made:
    """HelpSteer 2's and 3's preferences: a strength from -3 (the first is better) to 3."""
    data = reading.data
    third = "overall_preference" in data
    names = ("response1", "response2") if third else ("response_1", "response_2")
    strength = "overall_preference" if third else "preference_strength"
    value = reading.number(strength)
    if value is None:
        return []
    if value == 0:
        return "a tie"
    prompt = data.get("context") if third else reading.text("prompt")
    rest = reading.rest("context", "prompt", *names) | {"margin": abs(value)}
    return of_pair(reading, prompt, [data.get(n, NOTHING) for n in names], value < 0, rest)


def shp(reading: Reading) -> Made:
    """SHP: a post and two comments; label 1 says that A got more votes for its time."""
    label, ratio = reading.number("labels"), reading.number("score_ratio")
    if label not in (0, 1) and label is not None:
        reading.faults.add("labels", "0 or 1", Say(f"{label:g}"))
    if ratio is not None and ratio < reading.choices.min_ratio:
        return f"a score ratio below {reading.choices.min_ratio:g}"
    rest = reading.rest("history", "human_ref_A", "human_ref_B", "labels", "score_A", "score_B")
    scores = [reading.number("score_A"), reading.number("score_B")]
    rest |= dict(zip(("chosen_reward", "rejected_reward"), scores if label == 1 else scores[::-1]))
    sides = [reading.data.get("human_ref_A", NOTHING), reading.data.get("human_ref_B", NOTHING)]
    return of_pair(reading, reading.text("history"), sides, label == 1, rest)


def arena(reading: Reading) -> Made:
    """Arena votes: two conversations, or prompt, response_a and response_b; ties are dropped."""
    winner = _winner(reading)
    if winner is None:
        return []
    if winner == "tie":
        return "a tie"
    talks = [_talk(reading, side) for side in "ab"]
    if any(t is None for t in talks):
        return []
    a, b = (t for t in talks if t is not None)
    if len(a) != len(b) or a[:-1] != b[:-1]:
        return "conversations that part before the last answer"
    sides = ["conversation_a", "conversation_b", "prompt", "response_a", "response_b", "winner"]
    rest = reading.rest(*sides, "winner_model_a", "winner_model_b", "winner_tie", "question_id", "model_a", "model_b")
    if "question_id" in reading.data:
        rest["id"] = reading.data["question_id"]
    models = [reading.data.get("model_a"), reading.data.get("model_b")]
    first = winner == "a"
    rest |= {k: m for k, m in zip(("chosen_model", "rejected_model"), models if first else models[::-1]) if m}
    return of_pair(reading, a[:-1], [[a[-1]], [b[-1]]], first, rest)


def _winner(reading: Reading) -> str | None:
    data = reading.data
    if "winner_model_a" in data:
        votes = [data.get(n) for n in ("winner_model_a", "winner_model_b", "winner_tie")]
        if [v in (1, True) for v in votes].count(True) == 1:
            return "ab"[votes.index(1)] if votes[2] not in (1, True) else "tie"
        reading.faults.add("winner_model_a", "one winner among winner_model_a, winner_model_b, winner_tie", Say("none"))
        return None
    said = data.get("winner", NOTHING)
    if said in ("model_a", "model_b"):
        return str(said)[-1]
    if isinstance(said, str) and ("tie" in said or "both" in said):
        return "tie"
    reading.faults.add("winner", "model_a, model_b or a tie", said)
    return None


def _talk(reading: Reading, side: str) -> list[Any] | None:
    """One side's messages."""
    data, name = reading.data, f"conversation_{side}"
    if name in data:
        found = data[name]
        if isinstance(found, list) and len(found) > 1 and all(map(is_message, found)):
            return found
        reading.faults.add(name, "a list of messages", found)
        return None
    turns = [_turns(reading, n) for n in ("prompt", f"response_{side}")]
    if turns[0] is None or turns[1] is None:
        return None
    if len(turns[0]) != len(turns[1]):
        reading.faults.add(f"response_{side}", f"{len(turns[0])} turns, as many as the prompt's", turns[1])
        return None
    pairs = zip(*turns)
    return [m for q, a in pairs for m in ({"role": "user", "content": q}, {"role": "assistant", "content": a})]


def _turns(reading: Reading, name: str) -> list[Any] | None:
    """A list of texts, or JSON text of one; a text that is no list is a single turn."""
    value = reading.data.get(name, NOTHING)
    if isinstance(value, str) and value is not NOTHING and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            value = [value]
    if isinstance(value, list) and value:
        return value
    text = reading.text(name)
    return None if text is None else [text]


def thumb(value: object) -> bool | None:
    """What a thumb says; None for nothing known."""
    if isinstance(value, Mapping):
        value = next((value[k] for k in ("type", "value", "rating", "score") if k in value), None)
    said = str(value).strip().lower().replace(" ", "_").replace("-up", "_up").replace("-down", "_down")
    said = said.removesuffix(".0")
    return True if said in _UP else False if said in _DOWN else None


def feedback(reading: Reading) -> Made:
    """A log with thumbs: on the row, or on single messages of a conversation, each then a row with its prompt."""
    data = reading.data
    talk = next((n for n in ("messages", "conversation", "conversations") if isinstance(data.get(n), list)), None)
    marked = [] if talk is None else _marked(data[talk])
    if talk is not None and marked:
        return [_of_message(reading, talk, at, name) for at, name in marked if _known(reading, talk, at, name)]
    name = next(n for n in THUMBS if n in data)
    if data[name] is None or data[name] == "":
        return "no feedback"
    label = thumb(data[name])
    if label is None:
        reading.faults.add(name, "a thumb (up or down, like or dislike, 1 or -1, true or false)", data[name])
        return []
    rest = {**reading.rest(name), "label": label}
    if talk == "conversation":
        rest["messages"] = rest.pop(talk)
    return [rest]


def _marked(messages: Sequence[Any]) -> list[tuple[int, str]]:
    found = []
    for at, m in enumerate(messages):
        name = next((n for n in THUMBS if isinstance(m, dict) and m.get(n) not in (None, "")), None)
        if name and m.get("role", m.get("from")) in ("assistant", "gpt"):
            found.append((at, name))
    return found


def _known(reading: Reading, talk: str, at: int, name: str) -> bool:
    value = reading.data[talk][at][name]
    if thumb(value) is None:
        reading.faults.add(f"{talk}[{at}].{name}", "a thumb (up or down, like or dislike, 1 or -1, ...)", value)
    return thumb(value) is not None


def _of_message(reading: Reading, talk: str, at: int, name: str) -> dict[str, Any]:
    plain = [{k: v for k, v in m.items() if k not in THUMBS} for m in reading.data[talk][: at + 1]]
    return {**reading.rest(talk), "messages": plain, "label": thumb(reading.data[talk][at][name])}


def is_feedback(data: Mapping[str, Any]) -> bool:
    """One response or a conversation, and a thumb on the row or on a message."""
    talk: list[Any] = next(
        (data[n] for n in ("messages", "conversation", "conversations") if isinstance(data.get(n), list)), []
    )
    if any(n in data for n in ("chosen", "rejected", "responses", "completions", "answers")):
        return False
    one = bool(talk) or any(isinstance(data.get(n), str) for n in ("completion", "response", "output", "answer"))
    return one and (bool(_marked(talk)) or any(n in data for n in THUMBS))


def _solutions(data: Mapping[str, Any]) -> list[str]:
    return [k for k, v in data.items() if isinstance(v, Mapping) and {"is_correct", "solution"} <= set(v)]


def is_solutions(data: Mapping[str, Any]) -> bool:
    """A question, its true answer, and models' solutions with a verdict."""
    return "question" in data and "ground_truth" in data and bool(_solutions(data))


def solutions(reading: Reading) -> Made:
    """OpenAI's grade-school-math solutions: the verdict is label and reward; `answer` is what follows the last `A:`."""
    data, names = reading.data, _solutions(reading.data)
    responses = []
    for name in names:
        right = data[name]["is_correct"]
        if not isinstance(right, bool):
            reading.faults.add(f"{name}.is_correct", "true or false", right)
            continue
        reward = float(right)
        responses.append({"content": data[name]["solution"], "reward": reward, "label": right, "source": name})
    truth = reading.text("ground_truth") or ""
    answer = {"answer": truth.rpartition("A:")[2].strip()} if "A:" in truth else {}
    return [{**reading.rest("question", *names), "prompt": reading.text("question"), "responses": responses, **answer}]
