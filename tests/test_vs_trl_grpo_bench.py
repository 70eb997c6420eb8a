"""The comparison with TRL's GRPOTrainer: both sides run, and its tables say what was measured."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))


from harness.grpo_report import curves, parts, times
from vs_trl_grpo import PROMPTS, Setting, measure


def run(wall: float, sampling: float, reward: list[float]) -> dict[str, Any]:
    """Steps of so many seconds, sampling's share in them; the CPU works half of the time."""
    step = [wall, wall / 2, sampling, sampling / 2]
    return {"steps": [step, [9 * s for s in step], step], "reward": reward, "length": [3.0, 5.0], "gib": wall}


def test_a_step_is_sampling_and_training() -> None:
    assert parts(run(5.0, 2.0, [])) == {"whole step": (5.0, 2.5), "sampling": (2.0, 1.0), "training": (3.0, 1.5)}


def test_ratios_are_of_medians() -> None:
    runs = {"trl": [run(w, 1.0, []) for w in (6.0, 7.0, 80.0)], "po": [run(w, 1.0, []) for w in (2.0, 3.0, 5.0)]}
    lines = times(runs)
    assert "| training | trl | 6.00 | 3.00 | 3.00x | 3.00 to 19.75 | 3.00x |" in lines
    assert "| training | po | 2.00 | 1.00 | | | |" in lines
    assert "trl 7.00 GiB (2.33x), po 3.00 GiB. Tokens of a completion, mean: trl 4.0" in lines[-1]


def test_curves_that_differ_are_said_to() -> None:
    same = [run(1.0, 1.0, [0.5 + 0.01 * i, 0.6 + 0.01 * i]) for i in range(3)]
    other = [run(1.0, 1.0, [0.5 + 0.01 * i, 0.9 + 0.01 * i]) for i in range(3)]
    assert curves({"trl": same, "po": same})[-1].endswith(
        "+0.0 standard errors apart; 0 of 2 steps differ by more than 2."
    )
    assert curves({"trl": same, "po": other})[-1].endswith("1 of 2 steps differ by more than 2.")


@pytest.mark.slow
@pytest.mark.parametrize("side", ["trl-lean", "po"])
def test_a_side_runs(side: str, tmp_path: Path) -> None:
    if side != "po":
        pytest.importorskip("trl")
    setting = Setting(vocabulary=64, tokens=6, stop_every=16, learning_rate=1e-3, steps=3)
    setting.make(tmp_path / "world")
    assert Setting.read(tmp_path / "world") == setting
    assert len((tmp_path / "world" / "prompts.jsonl").read_text().splitlines()) == 3 * PROMPTS
    (found,) = measure(side, tmp_path / "world", [0])
    assert len(found["steps"]) == 2  # the first is left out
    assert all(0 < sampled < wall for wall, _, sampled, _ in found["steps"])
    assert len(found["reward"]) == 3
    assert all(0 < reward < 1 for reward in found["reward"])
    assert all(1 <= length <= 6 for length in found["length"])


@pytest.mark.slow
def test_trls_trainer_makes_the_same_of_pos_samples(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    Setting(vocabulary=64, tokens=8, stop_every=16, learning_rate=5e-3, steps=4).make(tmp_path)
    (found,) = measure("same", tmp_path, [0])
    assert found["reward"] < 1e-6
    assert found["grad_norm"] < 1e-4
    assert found["entropy"] < 1e-4
