"""What people see: progress of a stage, and the table at the end."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.table import Table

from po.sandbox.evaluation import Estimate, Evaluation


class ProgressLine:
    """Shows how far a stage is: one line rewritten in place on a terminal, elsewhere a line every fifth of the way."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._last = 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        """Report that `done` of `total` of what is being done are behind us."""
        now, share = time.perf_counter(), done / total
        if share < self._last:  # another stage
            self._start, self._last = now, 0.0
        left = (now - self._start) / share * (1 - share)
        text = f"      {what}: {done}/{total}, {left:.0f} s left"
        if sys.stdout.isatty():
            sys.stdout.write(f"\r{text:<78}" + ("\n" if done == total else ""))
        elif int(share * 5) > int(self._last * 5):
            sys.stdout.write(text + "\n")
        sys.stdout.flush()
        self._last = share if done < total else 1.0


def show(found: Evaluation, console: Console | None = None) -> None:
    """Print the comparison as a table, and a few samples side by side."""
    console = console or Console(width=None if sys.stdout.isatty() else 110)
    table = Table(
        title=f"{found.questions} held-out questions, {found.K} answers each (95 % intervals)", title_justify="left"
    )
    for name in ("", "base", "trained"):
        table.add_column(name, justify="left" if not name else "right")
    table.add_row("true reward, 0 to 1", _text(found.reward_before), _text(found.reward_after))
    table.add_row("exactly right", _text(found.exact_before), _text(found.exact_after))
    table.add_row("length, tokens", _text(found.length_before, 1), _text(found.length_after, 1))
    table.add_row("win rate against the base", "", _text(found.win_rate))
    table.add_row("KL to the base, nats per answer", "", _text(found.kl_sequence, 2))
    table.add_row("KL to the base, nats per token", "", _text(found.kl_token))
    console.print(table)
    samples = Table(
        title="The first answers to the first questions, with their true reward", title_justify="left", show_lines=True
    )
    for name in ("question", "base", "trained"):
        samples.add_column(name, ratio=1)
    for s in found.samples:
        samples.add_row(s.prompt, f"{s.before}\n({s.reward_before:.2f})", f"{s.after}\n({s.reward_after:.2f})")
    console.print(samples)


def _text(e: Estimate, digits: int = 3) -> str:
    return f"{e.value:.{digits}f}  {e.low:.{digits}f} to {e.high:.{digits}f}"
