"""benchmarks/stories.py: its reward, and one step of it where the model is at hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT / "benchmarks"))

import stories  # noqa: E402


def test_what_the_reward_counts() -> None:
    texts = ["She was HAPPY, happy and happy.", "He smiled and hugged her; they laughed.", "They were unhappy."]
    assert stories.joy(texts) == [0.5, 1.0, 0.0]
    assert stories.gloom([*texts, "He was sad."]) == [0, 0, 0, 1]


def test_held_out_openings_have_heroes_of_their_own() -> None:
    train, held_out = stories.openings(False), stories.openings(True)
    assert len(train) == 128
    assert len(held_out) == 64
    assert not any(name in text for text in train for name in (*stories.GIRLS[8:], *stories.BOYS[8:]))


def test_without_the_model_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert stories.main(["--shared", str(tmp_path), "--out", str(tmp_path)]) == 0
    assert "left out: there is no" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "models/stories260k").is_dir(), reason=f"no model in {SHARED}")
def test_a_few_steps(tmp_path: Path) -> None:
    assert stories.main(["--steps", "2", "--seeds", "1", "--out", str(tmp_path)]) == 0
    assert "| reward | 0." in (tmp_path / "stories.md").read_text()
