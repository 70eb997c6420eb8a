"""Where log lines go: metrics.jsonl in the run folder, and the terminal."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import ProgressCallback, TrainerCallback

_SHOWN = (  # metric, what the terminal calls it, format
    ("loss", "loss", ".4f"),
    ("eval_loss", "eval loss", ".4f"),
    ("reward", "reward", ".3f"),
    ("eval_reward", "reward", ".3f"),
    ("rewards/accuracies", "accuracy", ".3f"),
    ("eval_rewards/accuracies", "accuracy", ".3f"),
    ("rewards/margins", "margin", ".4f"),
    ("eval_rewards/margins", "margin", ".4f"),
    ("grad_norm", "grad norm", ".3g"),
    ("learning_rate", "lr", ".3g"),
    ("perf/tokens_per_s", "tokens/s", ",.0f"),
)


def _number(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


class MetricsFile(TrainerCallback):
    """Appends every log to metrics.jsonl: one JSON object with step, epoch, time and the metrics.

    JSON has no NaN: such a value is null, and "nonfinite" maps its name to "nan", "inf" or "-inf". A resumed run first
    drops the lines after the step it resumes from, a line cut by a kill, and the summary of a run that now goes on.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / "metrics.jsonl"

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not self._path.exists():
            return
        kept = [line for line in self._path.read_text(errors="replace").splitlines() if _stays(line, state.global_step)]
        staged = self._path.with_suffix(".tmp")
        staged.write_text("".join(f"{line}\n" for line in kept))
        staged.replace(self._path)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        values = {k: _number(v) for k, v in logs.items() if k != "epoch"}
        odd = {k: str(v) for k, v in values.items() if isinstance(v, float) and not math.isfinite(v)}
        line = {"step": state.global_step, "epoch": state.epoch, "time": round(time.time(), 3)}
        line |= {k: None if k in odd else v for k, v in values.items()}
        if odd:
            line["nonfinite"] = odd
        with self._path.open("a") as f:
            f.write(json.dumps(line) + "\n")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and self._path.exists():
            with self._path.open("a") as f:
                os.fsync(f.fileno())


def _stays(line: str, step: int) -> bool:
    try:
        found = json.loads(line)
        return bool(found["step"] <= step) and "train_runtime" not in found
    except (ValueError, KeyError, TypeError):
        return False  # cut short by a kill


class Progress(ProgressCallback):
    """One short line per log, with the time left; above it a progress bar where stderr is a terminal."""

    def __init__(self, bars: bool = True) -> None:
        super().__init__()
        self._bars = bars and sys.stderr.isatty()
        self._begin = (0, 0.0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begin = (state.global_step, time.perf_counter())
        if self._bars:
            super().on_train_begin(args, state, control, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bars:
            super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bars:
            super().on_prediction_step(args, state, control, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bars:
            super().on_train_end(args, state, control, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        text = line(logs, state.global_step, state.max_steps, self._left(state))
        if self.training_bar is not None:
            self.training_bar.write(text)
        else:
            sys.stdout.write(text + "\n")
            sys.stdout.flush()

    def _left(self, state: Any) -> float | None:
        first, start = self._begin
        done = state.global_step - first
        return None if done <= 0 else (time.perf_counter() - start) / done * (state.max_steps - state.global_step)


def line(logs: Mapping[str, Any], step: int, steps: int, left: float | None) -> str:
    """'step 40/200  loss 0.6931  accuracy 0.500 ...  left 0:12:30'."""
    parts = [f"step {step}/{steps}"]
    parts += [f"{label} {_number(logs[name]):{form}}" for name, label, form in _SHOWN if name in logs]
    if left is not None:
        minutes, seconds = divmod(round(left), 60)
        parts.append(f"left {minutes // 60}:{minutes % 60:02}:{seconds:02}")
    return "  ".join(parts)
