"""The benchmark of 2-GRPO: sums that do not leak, a pass rate computed rightly, arms equal in what they claim."""

from __future__ import annotations

import math
import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import two_grpo
from harness.stats import Interval
from harness.sums import Schooling, Sum, _spoilt, characters, probabilities, school, sums

TINY = Schooling(hidden_size=16, layers=1, shown=50, steps=3, train=30, held_out=20)


def test_sums() -> None:
    sets = sums(TINY)
    assert [len(s) for s in sets] == [50, 30, 20]
    assert len({s.prompt for part in sets for s in part}) == 100
    assert all(eval(s.prompt[:-1]) == int(s.answer) for part in sets for s in part)
    assert sums(TINY) == sets


def test_a_spoilt_answer_has_one_wrong_digit() -> None:
    rng = random.Random(0)
    for answer in ("85", "132", "20"):
        for _ in range(50):
            assert sum(a != b for a, b in zip(answer, _spoilt(answer, rng, 1.0), strict=True)) == 1
    spoilt = [_spoilt("85", rng, 0.3) != "85" for _ in range(2000)]
    assert sum(spoilt) / 2000 == pytest.approx(0.3, abs=0.04)


def test_pass_rate_is_the_probability_of_the_answer() -> None:
    """Token by token, one sum at a time; and over many answers probabilities add up to at most 1."""
    tokenizer = characters()
    model = school(TINY, sums(TINY)[0], tokenizer)
    asked = [Sum("47+38=", "85"), Sum("99+33=", "132")]
    found, greedy = probabilities(model, tokenizer, asked)
    for s, p, first in zip(asked, found.tolist(), greedy.tolist(), strict=True):
        ids, logp, likeliest = tokenizer(s.prompt)["input_ids"], 0.0, True
        for token in [*tokenizer(s.answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
            logp += logits.log_softmax(-1)[token].item()
            likeliest &= logits.argmax().item() == token
            ids = [*ids, token]
        assert p == pytest.approx(math.exp(logp), rel=1e-4)
        assert first == likeliest
    every = probabilities(model, tokenizer, [Sum("47+38=", str(n)) for n in range(10, 1000)])[0]
    assert 0 < every.sum() < 1


def test_arms_are_equal_in_what_they_claim() -> None:
    sixteen, rollouts, updates, *eighths = two_grpo.ARMS

    def spent(arm: two_grpo.Arm) -> tuple[float, float]:
        return two_grpo.UPDATES * arm.share, two_grpo.UPDATES * arm.share * arm.prompts * arm.samples

    assert spent(rollouts) == spent(sixteen)
    assert spent(updates) == (spent(sixteen)[0], spent(sixteen)[1] / 8)
    assert updates.prompts == sixteen.prompts
    for arm in eighths:
        assert spent(arm) == (spent(sixteen)[0] / 8, spent(sixteen)[1] / 8)
        assert arm.prompts * arm.samples == sixteen.prompts * sixteen.samples
    assert sorted(arm.scale for arm in eighths) == [1, math.sqrt(8), 8]
    assert all(arm.term["head"] == "grpo2" and arm.samples == 2 for arm in two_grpo.ARMS[1:])


def test_on_par_is_said_by_the_whole_interval() -> None:
    said = [two_grpo.on_par(Interval(mean, 0.02)).split(":")[0] for mean in (0.98, 0.96, 0.92)]
    assert said == ["on par", "undecided", "not on par"]
    assert two_grpo.on_par(Interval(1.0, math.nan)) == "one seed says nothing"


@pytest.mark.slow
def test_all_of_it_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert two_grpo.main(["--quick", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "two_grpo.md").read_text()
    for arm in two_grpo.ARMS:
        assert f"| {arm.name} | {arm.prompts} x {arm.samples} |" in text
    assert text.count("one seed says nothing") == len(two_grpo.ARMS) - 1
    assert text in capsys.readouterr().out
    assert (tmp_path / "sums/train.jsonl").read_text().count("\n") == 300
