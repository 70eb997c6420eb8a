"""The true reward as a reward function of a recipe: `function: po.sandbox.rewards:true_reward`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from po.sandbox.questions import reward

Said = str | Sequence[Mapping[str, Any]]


def true_reward(prompts: Sequence[Said], completions: Sequence[Said], **columns: Any) -> list[float]:
    """The true reward of each completion, in [0, 1]. Rows need nothing but their question, which says what it wants."""
    return [reward(prompt, _text(completion)) for prompt, completion in zip(prompts, completions, strict=True)]


def _text(completion: Said) -> str:
    return completion if isinstance(completion, str) else str(completion[-1]["content"])
