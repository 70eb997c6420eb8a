"""The verifier `math`: whether the completion's answer equals the row's, as the library math-verify parses them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from po.rewards.verifiers import Rowwise, after, column


@dataclass(frozen=True, kw_only=True)
class Math(Rowwise):
    """1 where the answers are equal as mathematics, else 0; 0 too where the completion has no answer.

    The answer is what the last \\boxed{} holds, else the last expression or number of the text. A gold answer that
    cannot be parsed is a fault of the row and fails the completion. Needs the package math-verify (`po[math]`).
    """

    column: str = "answer"  # the bare answer, or text with \boxed{} or $...$
    after: str | None = None  # only what follows the last of these counts, e.g. </think>
    answer: Literal["last", "boxed"] = "last"  # boxed: an answer outside \boxed{} is none

    @property
    def reads(self) -> tuple[str, ...]:
        """The gold answer."""
        return (self.column,)

    def load(self) -> None:
        """Its own timeouts are off: they are alarms, and the time limit here ends the process."""
        for name in ("math_verify.parser", "math_verify.grader"):
            logging.getLogger(name).setLevel(logging.ERROR)
        import math_verify  # noqa: F401

    def reward(self, text: str, ids: Sequence[int] | None, row: dict[str, Any]) -> float | None:
        """Both sides parsed, and compared as expressions or, where neither is one, as text."""
        from math_verify import parse, verify

        gold = column(row, self.column)
        if gold is None:
            return None
        said = str(gold)
        bare = not any(mark in said for mark in ("\\boxed", "$", "\\(", "\\["))
        parsed = parse(f"\\boxed{{{said}}}" if bare else said, parsing_timeout=None)
        if not parsed:
            raise ValueError(f"the gold answer {said[:60]!r} cannot be parsed")
        answer = after(text, self.after)
        if answer is None or (self.answer == "boxed" and "\\boxed" not in answer):
            return 0.0
        found = parse(answer, _targets(), parsing_timeout=None)
        return float(bool(found) and verify(parsed, found, timeout_seconds=None, raise_on_error=True))


def _targets() -> list[Any]:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig

    return [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
