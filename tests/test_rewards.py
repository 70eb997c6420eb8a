"""Reward functions, their sum, and what becomes of a reward that fails: never a number."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from po.errors import UserError
from po.rewards import Rewards, build_rewards, reward_name
from po.rewards.build import VERIFIERS, _verifier
from po.spec import RewardSpec

Build = Callable[..., Rewards]

FUNCTIONS = """
    import asyncio, math, os, sys, time
    from beside import BONUS

    calls = 0

    def by_length(completions, **kwargs):
        return [float(len(c)) for c in completions]

    def takes_little(completions, answer):
        return [1.0 if a in c else 0.0 for c, a in zip(completions, answer)]

    def everything(prompts, completions, completion_ids, **columns):
        assert set(columns) == {"answer", "level"}, columns
        return [p + c + str(ids) == "q0a0[0]" for p, c, ids in zip(prompts, completions, completion_ids)]

    async def waits(completions, **kwargs):
        await asyncio.sleep(0.01)
        return [BONUS] * len(completions)

    def maybe(completions, **kwargs):
        return [None if c == "none" else 2 for c in completions]

    def mixed(completions, **kwargs):
        values = {"nan": math.nan, "inf": -math.inf, "text": "0.5", "one": 1, "error": ValueError("this one")}
        return [values.get(c) for c in completions]

    def too_few(completions, **kwargs):
        return [1.0] * (len(completions) - 1)

    def raises(completions, **kwargs):
        raise RuntimeError("see https://me:pass@host/score?token=abc123&x=1")

    def hangs(completions, **kwargs):
        if "hang" in completions:
            while True:
                time.sleep(0.01) if completions[0] == "sleep" else None
        return [os.getpid()] * len(completions)

    def deep_hang(completions, **kwargs):
        return [float(len(str(9 ** 9 ** 9)))]  # in C, deaf to signals and threads

    def leaves(completions, **kwargs):
        os._exit(3) if "leave" in completions else None
        return [1.0] * len(completions)

    def exits(completions, **kwargs):
        sys.exit("no")

    def counts_calls(completions, **kwargs):
        global calls
        calls += 1
        return [calls] * len(completions)

    def spawns(completions, **kwargs):
        import subprocess
        child = subprocess.Popen(["sleep", "1000"])
        open(completions[0], "w").write(f"{os.getpid()} {child.pid}")
        time.sleep(1000)

    def a_number(completions, **kwargs):
        return 1.0

    def tensors(completions, **kwargs):
        import numpy
        return numpy.arange(len(completions), dtype="float32")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("rewards")
    (where / "mine.py").write_text(textwrap.dedent(FUNCTIONS))
    (where / "beside.py").write_text("BONUS = 0.5\n")
    (where / "broken.py").write_text("import not_there_at_all\n")
    return where


@pytest.fixture
def build(folder: Path) -> Iterator[Build]:
    made: list[Rewards] = []

    def make(*names: str | RewardSpec, **fields: Any) -> Rewards:
        specs = [RewardSpec(function=f"{folder}/mine.py:{n}", **fields) if isinstance(n, str) else n for n in names]
        made.append(build_rewards(specs))
        return made[-1]

    yield make
    for rewards in made:
        rewards.close()


def call(rewards: Rewards, *completions: str, **columns: list[Any]) -> list[float | None]:
    return [s.reward for s in rewards(["q"] * len(completions), completions, columns=columns)]


def test_functions_are_called_as_trl_calls_them(build: Build) -> None:
    rewards = build("everything", "takes_little")
    scored = rewards(["q0", "q1"], ["a0", "a1"], [[0], [1]], {"answer": ["a", "0"], "level": [1, 2]})
    assert [s.parts for s in scored] == [
        {"everything": 1.0, "takes_little": 1.0},
        {"everything": 0.0, "takes_little": 0.0},
    ]
    assert [s.reward for s in scored] == [2.0, 0.0]


def test_conversations_arrive_as_messages(build: Build) -> None:
    rewards = build("by_length")
    talk = [{"role": "assistant", "content": "two words"}]
    assert rewards([[{"role": "user", "content": "?"}]], [talk])[0].reward == 1.0  # one message


def test_a_column_called_completion_does_not_collide(build: Build) -> None:
    assert call(build("by_length"), "abc", prompt=["p"], completion=["c"]) == [3.0]


def test_weights_and_async(build: Build, folder: Path) -> None:
    specs = [
        RewardSpec(function=f"{folder}/mine.py:by_length", weight=0.25),
        RewardSpec(function=f"{folder}/mine.py:waits", weight=-2.0, name="slow"),
    ]
    scored = build(*specs)(["q"], ["four"])[0]
    assert scored.parts == {"by_length": 4.0, "slow": 0.5}
    assert scored.reward == 0.25 * 4 - 2 * 0.5


def test_numpy_comes_back_as_numbers(build: Build) -> None:
    assert call(build("tensors"), "a", "b") == [0.0, 1.0]


def test_state_is_kept_between_calls(build: Build) -> None:
    rewards = build("counts_calls")
    assert [call(rewards, "a"), call(rewards, "a")] == [[1.0], [2.0]]
    assert rewards([], []) == []


def test_none_does_not_apply(build: Build) -> None:
    rewards = build("maybe", "by_length")
    assert call(rewards, "none", "abc") == [4.0, 5.0]  # the sum over those that apply
    assert rewards.counts == {"maybe/none": 1}


def test_none_from_all_is_unscored(build: Build) -> None:
    rewards = build("maybe")
    scored = rewards(["q", "q"], ["none", "some"])
    assert [s.reward for s in scored] == [None, 2.0]
    assert scored[0].problems == ("none: no reward applies to this completion",)
    assert rewards.counts == {"maybe/none": 1, "unscored": 1}


def test_bad_values_fail_their_own_completion_only(build: Build) -> None:
    rewards = build("mixed", "by_length")
    scored = rewards(["q"] * 5, ["nan", "inf", "text", "one", "error"])
    assert [s.reward for s in scored] == [None, None, None, 4.0, None]
    assert scored[0].parts == {"mixed": None, "by_length": 3.0}
    assert [s.problems for s in scored] == [
        ("mixed/nan: returned NaN; None says that a reward does not apply",),
        ("mixed/inf: returned -inf",),
        ("mixed/type: returned '0.5'; expected a number or None",),
        (),
        ("mixed/raised: ValueError: this one",),
    ]
    kinds = {"mixed/nan": 1, "mixed/inf": 1, "mixed/type": 1, "mixed/raised": 1, "unscored": 4}
    assert rewards.counts == kinds


def test_failures_of_a_whole_call(build: Build) -> None:
    for name, problem in {
        "too_few": "too_few/count: returned 1 rewards for 2 completions",
        "exits": "exits/raised: SystemExit: no",
        "a_number": "a_number/type: returned 1.0; expected a list of 2 numbers",
    }.items():
        rewards = build(name)
        scored = rewards(["q", "q"], ["a", "b"])
        assert [(s.reward, s.problems) for s in scored] == [(None, (problem,))] * 2
        assert rewards.counts == {problem.partition(":")[0]: 2, "unscored": 2}


def test_texts_carry_no_secrets_and_are_few(build: Build) -> None:
    rewards = build("raises")
    for _ in range(5):
        call(rewards, "a")
    (text,) = rewards.texts["raises/raised"]
    assert "abc123" not in text
    assert "pass" not in text
    assert "host/score?token=[redacted]&x=[redacted]" in text
    assert rewards.counts["raises/raised"] == 5


@pytest.mark.parametrize("first", ["sleep", "spin"])
def test_a_function_that_hangs_is_ended_and_started_again(build: Build, first: str) -> None:
    rewards = build("hangs", timeout=1.5)
    (before,) = call(rewards, "a")
    scored = rewards(["q", "q"], [first, "hang"])
    assert [s.reward for s in scored] == [None, None]
    assert scored[0].problems[0].startswith("hangs/timeout: gave no answer in 1.5 s")
    assert rewards.counts == {"hangs/timeout": 2, "unscored": 2}
    with pytest.raises(ProcessLookupError):
        os.kill(int(before or 0), 0)
    (again,) = call(rewards, "a")
    assert again not in (None, before)


def test_code_that_no_signal_reaches_is_ended(build: Build) -> None:
    assert call(build("deep_hang", timeout=1.5), "a") == [None]


def test_what_a_function_started_ends_with_it(build: Build, tmp_path: Path) -> None:
    rewards = build("spawns", timeout=1.5)
    assert call(rewards, str(tmp_path / "pids")) == [None]
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    end = time.monotonic() + 20  # a killed process takes a moment to go on a busy machine
    while any(map(_alive, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(_alive, pids))


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_a_process_that_dies_is_named(build: Build) -> None:
    rewards = build("leaves")
    scored = rewards(["q"], ["leave"])[0]
    assert (scored.reward, scored.problems) == (None, ("leaves/died: its process ended by itself (exit code 3)",))
    assert call(rewards, "stay") == [1.0]


def test_a_failure_without_weight_is_counted_only(build: Build, folder: Path) -> None:
    rewards = build(RewardSpec(function=f"{folder}/mine.py:raises", weight=0.0), "by_length")
    scored = rewards(["q"], ["abc"])[0]
    assert scored.reward == 3.0
    assert len(scored.problems) == 1
    assert rewards.counts == {"raises/raised": 1}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            {"function": "{}/mine.py:by_lenght"},
            r"\.function: ValueError: .*has no function 'by_lenght'. Did you mean 'by_l",
        ),
        ({"function": "{}/mina.py:f"}, r"there is no file .* Did you mean 'mine.py'\?"),
        ({"function": "{}/broken.py:f"}, "ModuleNotFoundError: No module named 'not_there_at_all'"),
        ({"function": "no.such.module:f"}, "there is no module 'no.such.module' on the Python path"),
        ({"function": "by_length"}, "names no function; expected path/file.py:name or package.module:name"),
        ({"function": "{}/mine.py:by_length", "options": {"x": 1}}, r"options: a function takes none, got x"),
        ({"verifier": "maths"}, r"there is no verifier 'maths'. Did you mean 'math'\?"),
        ({"verifier": "exact", "options": {"colum": "a"}}, r"options.colum: unknown option. Did you mean 'column'\?"),
        (
            {"verifier": "exact", "options": {"time_limit": "soon"}},
            r"options.time_limit: got 'soon'. Input should be a valid n",
        ),
        (
            {"verifier": "length", "options": {"target": 0}},
            r"options.target: got 0. Input should be greater than or equal",
        ),
        ({"verifier": "length", "options": {"target": True}}, r"options.target: did not expect true"),
        ({"verifier": "format"}, r"rollout.rewards\[0\].options.pattern: is missing"),
        ({"verifier": "format", "options": {"pattern": "("}}, r"missing \), unterminated subpattern"),
        (
            {"verifier": "correct_length", "options": {"accuracy": "x", "target": 9}},
            "no reward before this one is named 'x'",
        ),
        ({"url": "ftp://x"}, "expected an address that begins with http:// or https://"),
        (
            {"url": "http://x", "options": {"token_env": "PO_NOT_SET"}},
            "the environment has no variable 'PO_NOT_SET'; set it",
        ),
        ({}, "expected exactly one of function, verifier, model and url, got none"),
    ],
)
def test_what_cannot_work_is_said_before_anything_runs(folder: Path, spec: dict[str, Any], message: str) -> None:
    if "function" in spec:
        spec = spec | {"function": spec["function"].format(folder)}
    with pytest.raises(UserError, match=message):
        build_rewards([RewardSpec(**spec)])


def test_two_rewards_of_one_name_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="'length' is the name of two rewards"):
        build_rewards([RewardSpec(verifier="length", options={"target": 9})] * 2)


def test_names() -> None:
    assert reward_name(RewardSpec(function="a/b.py:good")) == "good"
    assert reward_name(RewardSpec(url="https://u:p@judge:80/score?key=1")) == "judge:80/score"
    assert reward_name(RewardSpec(model="models/rm")) == "rm"
    assert reward_name(RewardSpec(verifier="math", name="right")) == "right"


def test_different_numbers_of_things_are_refused(build: Build) -> None:
    with pytest.raises(ValueError, match="differ in number"):
        build("by_length")(["q"], ["a", "b"])


def test_importing_rewards_imports_no_torch() -> None:
    code = "import sys, po.rewards; assert 'torch' not in sys.modules, 'torch'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_workers_end_with_a_killed_parent(folder: Path) -> None:
    code = f"""
import os
from po.rewards import build_rewards
from po.spec import RewardSpec
rewards = build_rewards([RewardSpec(function={str(folder / "mine.py") + ":hangs"!r})])
print(int(rewards(["q"], ["a"])[0].reward), flush=True)
rewards(["q"], ["hang"])
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        assert _alive(worker)
        parent.kill()
    for _ in range(200):
        if not _alive(worker):
            return
        time.sleep(0.05)
    pytest.fail("the worker outlived its parent")


def test_the_manual_shows_every_verifier_with_options_that_exist() -> None:
    manual = (Path(__file__).parents[1] / "docs" / "rewards.md").read_text()
    blocks = [
        yaml.safe_load(b if b.startswith("-") else "".join(f"- {line}\n" for line in b.splitlines()))
        for b in re.findall(r"```yaml\n(.*?)```", manual, re.DOTALL)
        if "rollout:" not in b
    ]
    shown = [one for block in blocks for one in (block if isinstance(block, list) else [block])]
    fitted = [(s, _verifier(s["verifier"], s.get("options", {}), "here")) for s in shown if "verifier" in s]
    assert {s["verifier"] for s, _ in fitted} == set(VERIFIERS)
    for said, target in fitted:
        names = {f.name for f in fields(target)} - {"time_limit"}
        assert names == set(said.get("options", {})) or said["verifier"] in ("math", "code", "exact"), said
