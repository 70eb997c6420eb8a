"""Verifiers by name."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from po.errors import UserError
from po.rewards import Scored, build_rewards
from po.spec import RewardSpec

needs_math = pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="needs po[math]")


def score(
    verifier: str, completions: list[Any], ids: list[list[int]] | None = None, options: Any = None, **columns: Any
) -> list[Scored]:
    rewards = build_rewards([RewardSpec(verifier=verifier, options=options or {})])
    try:
        return rewards(["q"] * len(completions), completions, ids, columns)
    finally:
        rewards.close()


def values(*args: Any, **kwargs: Any) -> list[float | None]:
    return [s.reward for s in score(*args, **kwargs)]


EXACT = [
    ("18", "18", 1.0),
    (" 18.0\n", "18", 1.0),
    ("$1,000", "1000", 1.0),
    ("1,00", "100", 0.0),
    ("Paris.", "paris", 1.0),
    ("New  York", "new york", 1.0),
    ("nan", "nan", 1.0),
    ("18 apples", "18", 0.0),
    ("", "18", 0.0),
    ("7", 7, 1.0),
]


def test_exact() -> None:
    said, gold, wanted = map(list, zip(*EXACT, strict=True))
    assert values("exact", said, answer=gold) == wanted


def test_exact_takes_the_last_match_of_a_pattern() -> None:
    said = ["A: 3\nso\nA: 18", "no answer", "A: 4"]
    assert values("exact", said, options={"pattern": r"^A: (.*)$"}, answer=["18"] * 3) == [1.0, 0.0, 0.0]
    said = ["<think>18</think> 3", "<think>3</think> 18", "18"]
    assert values("exact", said, options={"after": "</think>"}, answer=["18"] * 3) == [0.0, 1.0, 0.0]


def test_a_null_answer_does_not_apply_and_a_missing_column_is_named() -> None:
    null, other = score("exact", ["1", "1"], answer=[None, "1"])
    assert (null.reward, null.parts, other.reward) == (None, {"exact": None}, 1.0)
    (missing,) = score("exact", ["1"], solution=["1"])
    assert missing.problems == ("exact/raised: KeyError: \"the row has no column 'answer'; it has solution\"",)


def test_the_columns_that_rows_must_have() -> None:
    rewards = build_rewards(
        [
            RewardSpec(verifier="exact", options={"column": "gold"}),
            RewardSpec(verifier="contrastive"),
        ]
    )
    assert rewards.columns == {"gold", "baseline_rewards"}
    rewards.close()


def test_conversations_are_read_at_their_last_message() -> None:
    talk = [
        {"role": "assistant", "content": "5"},
        {"role": "tool", "content": "9"},
        {"role": "assistant", "content": "18"},
    ]
    assert values("exact", [talk], answer=["18"]) == [1.0]


def test_format() -> None:
    said = ["<think>a\nb</think> c", "x <think>a</think> c", "<think>a"]
    pattern = "<think>.*?</think>.*"
    assert values("format", said, options={"pattern": pattern}) == [1.0, 0.0, 0.0]
    assert values("format", said, options={"pattern": pattern, "match": "anywhere"}) == [1.0, 1.0, 0.0]


def test_a_pattern_that_explodes_costs_one_completion() -> None:
    said = ["aaa", "a" * 60 + "b", "aaaa"]
    found = score("format", said, options={"pattern": "(a+)+", "time_limit": 1.0})
    assert [s.reward for s in found] == [1.0, None, 1.0]
    assert found[1].problems[0].startswith("format/timeout: gave no answer in 1 s")


def test_lengths() -> None:
    ids = [[1] * n for n in (5, 10, 15, 40)]
    said = ["x"] * 4
    for wanted, expected in {
        "at_most": [0.0, 0.0, -0.5, -1.0],
        "at_least": [-0.5, 0.0, 0.0, 0.0],
        "near": [-0.5, -0.0, -0.5, -1.0],
    }.items():
        assert values("length", said, ids, {"target": 10, "wanted": wanted}) == expected
    (without,) = score("length", ["x"], options={"target": 10})
    assert without.problems == ("length/raised: ValueError: needs the completions' token ids",)


def test_a_tokenizer_gives_the_ids(tmp_path: Path) -> None:
    from tiny import make_model
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(make_model(tmp_path))
    rewards = build_rewards([RewardSpec(verifier="length", options={"target": 2})], tokenizer=tokenizer)
    assert [s.reward for s in rewards(["q"] * 2, ["w1 w2", "w1 w2 w3"])] == [0.0, -0.5]
    rewards.close()


def test_repetition_and_overlong_agree_with_trl() -> None:
    trl = pytest.importorskip("trl.rewards")
    ids = [[], [1], [1, 2, 3, 4], [5] * 5, [1, 2, 1, 2, 1, 2, 9], list(range(100)), list(range(90)), list(range(81))]
    said = ["x"] * len(ids)
    theirs = trl.get_repetition_penalty_reward(ngram_size=2, max_penalty=-0.5)(completion_ids=ids)
    assert values("repetition", said, ids, {"n": 2, "penalty": 0.5}) == pytest.approx(theirs)
    theirs = trl.get_soft_overlong_punishment(max_completion_len=99, soft_punish_cache=20)(completion_ids=ids)
    assert values("soft_overlong", said, ids, {"max_length": 99, "cache": 20}) == pytest.approx(theirs)
    assert values("soft_overlong", ["x"], [[1] * 90], {"max_length": 100, "cache": 20}) == [-0.5]
    assert values("soft_overlong", ["x"] * 2, [[1] * 9, [1] * 10], {"max_length": 9, "cache": 0}) == [0.0, -1.0]


MATH = [
    ("The answer is $18.00$", "18", 1.0),
    (r"so \boxed{0.5}", r"\frac12", 1.0),
    ("He makes 9 * 2 = $<<9*2=18>>18.\nA: 18", "18", 1.0),
    (r"3*24=72. So \boxed{72} eggs, 3 each", "72", 1.0),
    (r"\boxed{6} is 5", "5", 0.0),
    (r"\boxed{x = 3}", "3", 1.0),
    (r"\boxed{2x + x^2}", "x(x+2)", 1.0),
    (r"\boxed{(1,2)}", "(1, 2)", 1.0),
    ("I do not know", "18", 0.0),
    ("", "18", 0.0),
    (r"\boxed{1{,}000}", "1,000", 1.0),
    (r"\boxed{17}", r"It is \boxed{18}", 0.0),
]


@needs_math
def test_math() -> None:
    said, gold, wanted = map(list, zip(*MATH, strict=True))
    assert values("math", said, answer=gold, options={"time_limit": 20}) == wanted


@needs_math
def test_math_options_and_faults_of_the_row() -> None:
    rewards = build_rewards(
        [RewardSpec(verifier="math", options={"column": "gold", "answer": "boxed", "after": "</t>"})]
    )
    said = ["18", r"\boxed{18}", r"</t>\boxed{18}", r"</t>18", r"</t>\boxed{18}", "x"]
    found = rewards(["q"] * 6, said, columns={"gold": ["18", 18, 18.0, "18", "", None]})
    rewards.close()
    assert [s.reward for s in found] == [0.0, 0.0, 1.0, 0.0, None, None]
    assert found[4].problems == ("math/raised: ValueError: the gold answer '' cannot be parsed",)


@needs_math
def test_mathematics_that_hangs_costs_one_completion() -> None:
    said = [r"\boxed{2}", r"\boxed{9^{9^{9^{9}}}}", r"\boxed{2}"]
    rewards = build_rewards([RewardSpec(verifier="math", options={"time_limit": 4})])
    found = rewards(["q"] * 3, said, columns={"answer": ["2", "7", "2"]})
    rewards.close()
    assert [s.reward for s in found] == [1.0, None, 1.0]
    assert rewards.counts == {"math/timeout": 1, "unscored": 1}


def test_math_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"math needs the package math-verify; pip install 'po\[math\]'"):
        build_rewards([RewardSpec(verifier="math")])
