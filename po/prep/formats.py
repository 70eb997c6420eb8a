"""The formats that convert.py tells apart, and what each is recognised by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from po.data.messages import HUMAN
from po.errors import UserError, suggest
from po.prep import human, ultrafeedback
from po.prep.reading import Format


def _has(*names: str) -> Any:
    return lambda data: all(data.get(n) is not None for n in names)


def _ranked_answers(data: Mapping[str, Any]) -> bool:
    found = data.get("answers")
    return isinstance(found, list) and bool(found) and all(isinstance(a, dict) and "rank" in a for a in found)


def _hh(data: Mapping[str, Any]) -> bool:
    return "prompt" not in data and all(
        isinstance(data.get(n), str) and data[n].lstrip().startswith(HUMAN.strip()) for n in ("chosen", "rejected")
    )


def _mix(data: Mapping[str, Any]) -> bool:
    sides = all(isinstance(data.get(n), list) for n in ("chosen", "rejected"))
    return (sides and any(n in data for n in ("chosen_model", "chosen_rating"))) or (sides and "source" in data)


def _nemo(data: Mapping[str, Any]) -> bool:
    found = data.get("completions")
    return (
        isinstance(data.get("context"), list)
        and isinstance(found, list)
        and bool(found)
        and all(isinstance(c, dict) and "completion" in c and "rank" in c for c in found)
    )


_PAIR = ("chosen", "rejected")
FORMATS = (  # the first that fits
    Format("ultrafeedback", "instruction, completions with annotations", ultrafeedback.detect, ultrafeedback.read),
    Format("solutions", "question, ground_truth, solutions with is_correct", human.is_solutions, human.solutions),
    Format("nectar", "prompt, answers with rank", _ranked_answers, ranked=True),
    Format("nemo-rl", "context, completions with rank", _nemo, ranked=True),
    Format(
        "helpsteer", "prompt, response, " + ", ".join(human.HELPSTEER), _has("prompt", "response", *human.HELPSTEER)
    ),
    Format(
        "helpsteer2-preference",
        "prompt, response_1, response_2, preference_strength",
        _has("response_1", "response_2", "preference_strength"),
        human.helpsteer_pair,
    ),
    Format(
        "helpsteer3",
        "context, response1, response2, overall_preference",
        _has("context", "response1", "response2", "overall_preference"),
        human.helpsteer_pair,
    ),
    Format(
        "shp", "history, human_ref_A, human_ref_B, labels", _has("history", "human_ref_A", "human_ref_B"), human.shp
    ),
    Format(
        "arena",
        "conversation_a and _b (or response_a and _b), winner",
        lambda d: (
            any(f"{n}_a" in d and f"{n}_b" in d for n in ("conversation", "response"))
            and ("winner" in d or "winner_model_a" in d)
        ),
        human.arena,
    ),
    Format("ms-swift", "messages, rejected_response", lambda d: "messages" in d and "rejected_response" in d),
    Format("axolotl", "chosen_response, rejected_response", _has("chosen_response", "rejected_response")),
    Format("hh-rlhf", "chosen and rejected that begin with Human:", _hh),
    Format("zephyr-ultrafeedback", "prompt_id, chosen, rejected, scores", _has("prompt_id", *_PAIR, "score_chosen")),
    Format("tulu-olmo", "chosen and rejected conversations with source or models", _mix),
    Format("llama-factory-kto", "kto_tag", _has("kto_tag")),
    Format("llama-factory", "conversations, chosen, rejected", _has("conversations", *_PAIR)),
    Format("llama-factory-alpaca", "instruction, chosen, rejected", _has("instruction", *_PAIR)),
    Format("feedback", "a response and a thumb", human.is_feedback, human.feedback),
)
ROWS = Format("po", "any other that po reads (docs/data.md)", lambda data: True)
BY_NAME = {f.name: f for f in (*FORMATS, ROWS)}


def find_format(data: Mapping[str, Any]) -> Format:
    """The first format that a record fits."""
    return next((f for f in FORMATS if f.detect(data)), ROWS)


def named(name: str) -> Format | None:
    """The format of that name; None for auto."""
    if name == "auto":
        return None
    if name not in BY_NAME:
        raise UserError(
            f"--format: unknown {name!r}.{suggest(name, ['auto', *BY_NAME])} Known: auto, {', '.join(BY_NAME)}"
        )
    return BY_NAME[name]
