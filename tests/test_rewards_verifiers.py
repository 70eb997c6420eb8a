"""Verifiers by name, and what reads other rewards."""

from __future__ import annotations

import importlib.util
import itertools
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from po.errors import UserError
from po.rewards import Scored, build_rewards
from po.rewards.code import isolation, program_of
from po.rewards.group import (
    anchor_ranking,
    contrast_mask,
    contrastive_rewards,
    correct_length,
    first_pit,
    pairwise_ranking,
    rank_normalised,
    step_advantages,
)
from po.spec import RewardSpec

needs_math = pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="needs po[math]")
needs_isolation = pytest.mark.skipif(isolation() is None, reason="this machine has no unprivileged namespaces")


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


GOOD = "def double(x):\n    return 2 * x\n"


def run_code(program: str, tests: Any, **options: Any) -> tuple[Scored, dict[str, int]]:
    rewards = build_rewards([RewardSpec(verifier="code", options={"memory_mb": 256, "time_limit": 5} | options)])
    try:
        return rewards(["q"], [program], columns={"tests": [tests]})[0], dict(rewards.counts)
    finally:
        rewards.close()


@needs_isolation
@pytest.mark.parametrize(
    ("program", "tests", "reward"),
    [
        (f"Here:\n```python\n{GOOD}```\nDone.", "assert double(2) == 4", 1.0),
        (GOOD, ["assert double(2) == 4", "assert double(2) == 5"], 0.0),
        ("import sys\nsys.exit(0)", "assert double(2) == 4", 0.0),
        ("import os\nos._exit(0)", "assert double(2) == 4", 0.0),
        ("def double(x", "assert double(2) == 4", 0.0),
        ("print(int(input()) * 2)", [{"input": "3\n", "output": "6"}, {"input": "0", "output": "0\n"}], 1.0),
        ("print(7)", [{"input": "3\n", "output": "6"}], 0.0),
        (GOOD, None, None),
    ],
)
def test_code(program: str, tests: Any, reward: float | None) -> None:
    assert run_code(program, tests)[0].reward == reward


@needs_isolation
def test_code_in_parts() -> None:
    tests = ["assert double(2) == 4", "assert double(2) == 5", "assert double(0) == 0", "import nothing_here"]
    assert run_code(GOOD, tests, partial=True)[0].reward == 0.5


@needs_isolation
def test_code_is_limited_in_time_and_memory() -> None:
    scored, counts = run_code("while True: pass", "", time_limit=0.5)
    assert (scored.reward, counts) == (0.0, {"code/program_timeout": 1})
    scored, counts = run_code("x = bytearray(10**9)", "")
    assert (scored.reward, counts) == (0.0, {"code/program_memory": 1})
    assert run_code("import resource as r; r.setrlimit(r.RLIMIT_AS, (-1, -1))", "")[0].reward == 0.0


@needs_isolation
def test_code_has_no_network_no_secrets_and_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SECRET", "x")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        program = f"import os, socket\nassert 'MY_SECRET' not in os.environ\nassert os.listdir() == []\n{GOOD}"
        reach = f"socket.create_connection(('127.0.0.1', {port}), 2)"
        test = f"try:\n    {reach}\nexcept OSError:\n    pass\nelse:\n    raise SystemExit('reached')\n"
        assert run_code(program, test)[0].reward == 1.0
        server.settimeout(0.01)
        with pytest.raises(TimeoutError):
            server.accept()
        assert run_code(f"import socket\n{reach}", "", network="open")[0].reward == 1.0  # the same with a network
    mark = tmp_path / "alive"
    child = f"import time\nwhile True:\n    open({str(mark)!r}, 'a').write('x')\n    time.sleep(0.01)"
    start = f"import os, subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True)"
    assert run_code(start, f"while not os.path.exists({str(mark)!r}): pass")[0].reward == 1.0
    size = mark.stat().st_size
    time.sleep(0.2)
    assert mark.stat().st_size == size


@needs_isolation
def test_faults_of_the_row_are_no_verdict_on_the_program() -> None:
    for tests, text in {
        "assert (": "a test of the row is not Python",
        (): "the row has an empty list of tests",
        (3,): "a test must be Python code or",
    }.items():
        scored, counts = run_code(GOOD, list(tests) if isinstance(tests, tuple) else tests)
        assert scored.reward is None
        assert text in scored.problems[0]
        assert counts == {"code/raised": 1, "unscored": 1}


def test_code_without_namespaces_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable))
    with pytest.raises(UserError, match="lets no process cut itself off from the network"):
        build_rewards([RewardSpec(verifier="code")])


def test_the_program_in_a_completion() -> None:
    assert program_of("a\n```py\nx=1\n```\n```\ny=2\n```\nb") == "y=2\n"
    assert program_of("x = 1") == "x = 1"


# What reads a group: section E's vectors, and the properties that their entries name.


def test_contrast_mask() -> None:
    helps = ([1, 1, 0, 0], [True, True, False, False])
    hurts = ([0, 0, 1, 1], [True, True, False, False])
    neutral = ([1, 0, 1, 0], [True, True, False, False])
    alone = ([1, 0, 1, 0], [True] * 4)
    assert [contrast_mask(a, b, 0.1) for a, b in (helps, hurts, neutral, alone)] == [1, -1, 0, 0]
    for accuracy in itertools.product([0.0, 0.5, 1.0], repeat=4):
        for behaviour in itertools.product([True, False], repeat=4):
            mask = contrast_mask(accuracy, behaviour, 0.3)
            assert mask == -contrast_mask(accuracy, [not b for b in behaviour], 0.3)
            assert mask == 0 or len(set(behaviour)) == 2


def test_contrastive_rewards_vector() -> None:
    assert contrastive_rewards([1.2, 0.3], [[0.5, 0.1, 0.3], [1, 0.8, 0.9]]) == pytest.approx([0.9, -0.6])
    with pytest.raises(ValueError, match="expected a list of finite baseline rewards"):
        contrastive_rewards([1.0], [[]])


def test_steps_vector() -> None:
    values = [0.8, 0.4, 0.4, 0.0]
    assert step_advantages(0.6, values) == pytest.approx([0.2, -0.4, 0.0, -0.4])
    assert sum(step_advantages(0.6, values)) == pytest.approx(values[-1] - 0.6)
    assert first_pit(values) == 3  # step 4
    assert first_pit([0.8, 0.4, 0.4]) == 1


def test_correct_length() -> None:
    assert [correct_length(n, True, 10, 0.5) for n in (0, 5, 10, 99)] == [0, 0.25, 0.5, 0.5]
    assert correct_length(5, False, 10, 0.5) == 0


def test_anchor_ranking() -> None:
    assert rank_normalised([0.3, 0.9, 0.3, -1.0]) == pytest.approx([0.5, 1.0, 0.5, 0.0])
    assert rank_normalised([4.0]) == [0.5]
    first, second = [0.9, 0.2, 0.6, 0.5], [0.8, 0.1, 0.4, 0.5]
    rewards, alike = anchor_ranking(first, second)
    assert rewards == pytest.approx([1.0, 0.0, 0.5, 0.5])
    assert alike == [True, True, False, True]
    for order in itertools.permutations(range(4)):
        shuffled, _ = anchor_ranking([first[i] for i in order], [second[i] for i in order])
        assert shuffled == [rewards[i] for i in order]


def test_pairwise_ranking() -> None:
    judge = [[0, 0.9, 0.6], [0.2, 0, 0.3], [0.5, 0.8, 0]]  # [i][j]: i shown first
    rewards, agreement = pairwise_ranking(judge)
    assert rewards == [1.0, 0.0, 0.5]
    assert agreement == pytest.approx(2 / 3)  # of 0 and 2, one order says a tie
    for order in itertools.permutations(range(3)):
        shuffled, same = pairwise_ranking([[judge[i][j] for j in order] for i in order])
        assert (shuffled, same) == ([rewards[i] for i in order], agreement)


def test_shaping_reads_other_rewards_and_the_group() -> None:
    specs = [
        RewardSpec(verifier="exact", options={"pattern": r"\d+"}),
        RewardSpec(verifier="format", name="aux", weight=0.0, options={"pattern": "<aux>", "match": "anywhere"}),
        RewardSpec(verifier="group_contrast", weight=0.5, options={"accuracy": "exact", "behaviour": "aux"}),
        RewardSpec(verifier="correct_length", weight=2.0, options={"accuracy": "exact", "target": 4}),
        RewardSpec(verifier="contrastive"),
    ]
    rewards = build_rewards(specs)
    said = ["<aux> 18", "3", "<aux> 3", "18", "<aux> 18"]
    columns = {"answer": ["18"] * 4 + [None], "baseline_rewards": [[0, 1], [0, 1], None, [0.5], [1.0]]}
    scored = rewards(["p", "p", "r", "r", "p"], said, [[1], [1, 1], [1], [1, 1], [1]], columns)
    rewards.close()
    assert [s.parts["group_contrast"] for s in scored] == [1.0, 0.0, -1.0, 0.0, None]
    assert [s.parts["correct_length"] for s in scored] == [0.25, 0.0, 0.0, 0.5, None]
    assert [s.parts["contrastive"] for s in scored] == [-0.5, -0.5, None, -0.5, -1.0]
    assert [s.reward for s in scored] == [1 + 0.5 + 0.5 - 0.5, -0.5, -0.5, 1 + 1 - 0.5, -1.0]


def test_groups_are_the_callers_where_it_says() -> None:
    specs = [
        RewardSpec(verifier="exact", name="a", weight=0.0),
        RewardSpec(verifier="exact", name="b", weight=0.0, options={"column": "other"}),
        RewardSpec(verifier="anchor_rank", options={"first": "a", "second": "b"}),
    ]
    rewards = build_rewards(specs)
    columns = {"answer": ["1", "2", "1", "1"], "other": ["1", "2", "1", "2"]}
    found = rewards(["p"] * 4, ["1"] * 4, columns=columns, groups=[7, 7, 8, 8])
    assert [s.reward for s in found] == [1.0, 0.0, 1.0, 0.0]
    assert rewards.counts == {"anchor_rank/orders_disagree": 1}
    columns["other"] = ["1", "2", "1", None]
    found = rewards(["p"] * 4, ["1"] * 4, columns=columns, groups=[7, 7, 8, 8])
    assert [s.reward for s in found] == [1.0, 0.0, 0.5, None]
    rewards.close()


def test_shaping_over_a_failure_is_a_failure() -> None:
    specs = [
        RewardSpec(verifier="exact", weight=0.0),
        RewardSpec(verifier="correct_length", options={"accuracy": "exact", "target": 4}),
    ]
    rewards = build_rewards(specs)
    (scored,) = rewards(["p"], ["1"], [[1]])
    rewards.close()
    assert scored.reward is None
    assert scored.problems[1] == "correct_length/raised: the reward 'exact' that it reads failed"
