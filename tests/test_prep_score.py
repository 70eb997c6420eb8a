"""Scoring: merging by numbers, missing scores, verifiers, reward models and judges by the script."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from fake_openai import FakeOpenAI
from prep_support import ran, read, script, write
from test_rewards_models import models  # noqa: F401  (a fixture)

from po.data.formats import convert
from po.data.read import Record
from po.data.wanted import Wanted
from po.errors import UserError
from po.prep.judge_spec import JudgeSpec, prompt_of
from po.prep.merge import merge
from po.spec import Source

SOURCE = Source("in.jsonl")
GSM8K = Path(__file__).parents[1].parent / "shared" / "data" / "gsm8k_solutions.jsonl.gz"


def shown(text: str) -> tuple[str, str]:
    """What a pairwise request shows as A and as B."""
    a = text.partition("<answer_a>\n")[2].partition("\n</answer_a>")[0]
    return a, text.partition("<answer_b>\n")[2].partition("\n</answer_b>")[0]


SCORES = [[1.0, 2.0, 6.0], [10.0, 10.0, 4.0]]


@pytest.mark.parametrize(
    ("rule", "want"),
    [
        ("weighted", [1 * 0.5 + 10 * 2, 2 * 0.5 + 10 * 2, 6 * 0.5 + 4 * 2]),
        ("mean", [5.5, 6, 5]),
        ("min", [1, 2, 4]),
        ("max", [10, 10, 6]),
        ("median", [5.5, 6, 5]),
        ("first", [1, 2, 6]),
        ("rank", [(0 + 0.75) / 2, (0.5 + 0.75) / 2, (1 + 0) / 2]),
        # means 3 and 8; standard deviations sqrt(14/3) and sqrt(8)
        ("zscore", [(-2 / (14 / 3) ** 0.5 + 2 / 8**0.5) / 2, (-1 / (14 / 3) ** 0.5 + 2 / 8**0.5) / 2,
                    (3 / (14 / 3) ** 0.5 - 4 / 8**0.5) / 2]),
    ],
)  # fmt: skip
def test_merging_by_hand(rule: Any, want: list[float]) -> None:
    assert merge(rule, SCORES, [0.5, 2]) == pytest.approx(want, abs=1e-12)


def test_merging_three_and_equal_ones() -> None:
    assert merge("median", [[1], [2], [9]], [1, 1, 1]) == [2]
    assert merge("zscore", [[3.0, 3.0], [1.0, 2.0]], [1, 1]) == [-0.5, 0.5]
    assert merge("rank", [[3.0], [9.0]], [1, 1]) == [0.5]


def test_verifiers_score_sets_pairs_and_rollouts(tmp_path: Path) -> None:
    rollout = {
        "id": "roll", "prompt": "2+2=", "prompt_ids": [1, 5], "tokenizer": "k", "answer": "4",
        "responses": [{"content": "4", "token_ids": [7, 2], "logps": [-1.0, -0.5], "source": "policy"},
                      {"content": "4", "token_ids": [7, 2], "logps": [-1.0, -0.5], "source": "policy"}],
    }  # fmt: skip
    rows = [
        {"id": "set", "prompt": "2+2=", "answer": "4", "responses": ["5", "4"]},
        {"id": "pair", "prompt": "2+2=", "answer": "4", "chosen": "5", "rejected": "4"},
        {"id": "one", "prompt": "2+2=", "answer": "4", "completion": "4"},
        rollout,
    ]
    out, report = ran("score", "--scorer", "exact", output=tmp_path / "o.jsonl", rows=rows)
    by = {r["id"]: r for r in out}
    assert by["set"]["responses"] == [
        {"content": "5", "reward": 0.0, "scores": {"exact": 0.0}},
        {"content": "4", "reward": 1.0, "scores": {"exact": 1.0}},
    ]
    assert by["pair"] == {
        "id": "pair", "prompt": "2+2=", "answer": "4", "chosen": "5", "chosen_reward": 0.0,
        "chosen_scores": {"exact": 0.0}, "rejected": "4", "rejected_reward": 1.0, "rejected_scores": {"exact": 1.0},
    }  # fmt: skip
    assert by["one"]["responses"] == [{"content": "4", "reward": 1.0, "scores": {"exact": 1.0}}]
    assert by["roll"]["prompt_ids"] == [1, 5]
    assert [a["token_ids"] for a in by["roll"]["responses"]] == [[7, 2], [7, 2]]
    assert report["sums"] == {"mean reward": 0.75, "pairs whose chosen answer has the lower reward": 1}
    for row in out:
        found = convert(Record("o", row), SOURCE, Wanted(single=True))
        assert not found.problems
        assert found.row is not None
        assert all(r.reward is not None for r in found.row.responses)


def test_math_agrees_with_the_verdicts_of_gsm8k(tmp_path: Path) -> None:
    if not GSM8K.exists():
        pytest.skip(f"no {GSM8K}")
    pytest.importorskip("math_verify")
    sets = tmp_path / "sets.jsonl"
    script("convert").main([str(GSM8K), "-o", str(sets), "--limit", "60"])
    output = tmp_path / "scored.jsonl"
    script("score").main([str(sets), "-o", str(output), "--scorer", "math", "--given", "keep"])
    scores = [a["scores"] for row in read(output) for a in row["responses"]]
    assert len(scores) == 240
    assert all(s["math"] == s["given"] for s in scores)
    assert {s["math"] for s in scores} == {0.0, 1.0}


MINE = """
def long(completions, **kwargs):
    return [float(len(c)) for c in completions]

def some(completions, **kwargs):
    return [None if c == "none" else float("nan") if c == "nan" else 1.0 for c in completions]

def level(completions, level, **kwargs):
    return [None if x is None else float(x) for x in level]
"""


def mine(tmp_path: Path, name: str, **more: Any) -> str:
    (tmp_path / "mine.py").write_text(MINE)
    return json.dumps({"function": f"{tmp_path / 'mine.py'}:{name}", **more})


@pytest.mark.parametrize("missing", ["bad", "drop-row", "drop-response"])
def test_what_becomes_of_a_missing_score(tmp_path: Path, missing: str) -> None:
    rows = [
        {"id": "fine", "prompt": "a", "responses": ["x", "yy"]},
        {"id": "three", "prompt": "a", "responses": ["x", "nan", "yy"]},
        {"id": "two", "prompt": "a", "responses": ["x", "nan"]},
        {"id": "pair", "prompt": "a", "chosen": "x", "rejected": "nan"},
        {"id": "none", "prompt": "a", "responses": ["x", "none"]},
    ]
    argv = ["--missing", missing, "--merge", "mean", "--max-bad", "9"]
    for name in ("long", "some"):
        argv += ["--scorer", mine(tmp_path, name)]
    out, report = ran("score", *argv, output=tmp_path / "o.jsonl", rows=rows)
    assert out[0]["responses"][1] == {"content": "yy", "reward": 1.5, "scores": {"long": 2.0, "some": 1.0}}
    said = "returned NaN; None says that a reward does not apply"
    nan, alone = "no score from some (nan)", "no score from some (does not apply to this answer alone)"
    if missing == "bad":
        assert [r["id"] for r in out] == ["fine"]
        assert report["bad"] == 4
        assert report["problems"][0] == (f"o-in.jsonl:2: responses[1]: expected a score from some, got nan: {said}"), (
            report["problems"]
        )
    elif missing == "drop-row":
        assert [r["id"] for r in out] == ["fine"]
        assert report["dropped"] == {nan: 3, alone: 1}
        assert report["ids"][nan] == ["three", "two", "pair"]
    else:
        assert [r["id"] for r in out] == ["fine", "three"]
        assert [a["content"] for a in out[1]["responses"]] == ["x", "yy"]
        assert out[1]["unscored"] == [{"content": "nan", "scorer": "some", "why": f"nan: {said}"}]
        assert report["dropped"] == {nan: 2, alone: 1}
        assert report["sums"]["answers left out: no score"] == 1
    assert report["sums"]["some: no score (nan)"] == 3  # of bad rows too


def test_a_scorer_takes_no_part_in_rows_that_it_does_not_apply_to(tmp_path: Path) -> None:
    rows = [{"id": str(v), "prompt": "a", "level": v, "responses": ["x", "yy"]} for v in (5, None)]
    argv = ["--scorer", mine(tmp_path, "long"), "--scorer", mine(tmp_path, "level"), "--merge", "mean"]
    out, report = ran("score", *argv, output=tmp_path / "o.jsonl", rows=rows)
    assert [a["reward"] for r in out for a in r["responses"]] == [3, 3.5, 1, 2]
    assert [a["scores"] for a in out[1]["responses"]] == [{"long": 1}, {"long": 2}]
    assert report["sums"] == {"mean reward": 2.375, "level: rows it does not apply to": 1}
    alone = [{"id": "one", "prompt": "a", "completion": "x"}]
    _, report = ran("score", *argv[:2], "--merge", "rank", output=tmp_path / "q.jsonl", rows=alone)
    assert report["dropped"] == {"rank compares answers, and there is one": 1}
    out, report = ran("score", *argv[2:4], "--missing", "drop-row", output=tmp_path / "p.jsonl", rows=rows)
    assert report["dropped"] == {"no score from any scorer (none applies)": 1}


def test_rewards_that_rows_already_have(tmp_path: Path) -> None:
    answers = [
        {"content": "x", "reward": 7, "scores": {"old": 2}},
        {"content": "yy", "reward": 5, "scores": {"old": 3}},
    ]
    rows = [{"id": "a", "prompt": "a", "responses": answers}]

    def scored(*argv: str) -> list[Any]:
        out, _ = ran("score", "--scorer", mine(tmp_path, "long"), *argv, output=tmp_path / "o.jsonl", rows=rows)
        return [(a["reward"], a["scores"]) for a in out[0]["responses"]]

    with pytest.raises(UserError, match="1 of 1 rows are bad"):
        scored()
    assert "expected no rewards yet (or --given keep, merge or replace), got 7.0 on the first response" in (
        (tmp_path / "o.jsonl.report.json").read_text()
    )
    assert scored("--given", "keep") == [
        (1, {"old": 2, "long": 1, "given": 7}),
        (2, {"old": 3, "long": 2, "given": 5}),
    ]
    assert scored("--given", "merge", "--merge", "mean")[0] == (4, {"old": 2, "long": 1, "given": 7})
    assert scored("--given", "replace")[0] == (1, {"long": 1})


def test_a_scorer_of_weight_0_is_kept_beside_the_reward(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "prompt": "a", "responses": ["x", "nan", "yy"]},
        {"id": "b", "prompt": "a", "responses": ["x", "z"]},
    ]
    argv = ["--scorer", mine(tmp_path, "long", weight=2), "--scorer", mine(tmp_path, "some", weight=0)]
    out, report = ran("score", *argv, output=tmp_path / "o.jsonl", rows=rows)
    assert [a["reward"] for a in out[0]["responses"]] == [2, 6, 4]
    assert [a["scores"] for r in out for a in r["responses"]] == [
        {"long": 1}, {"long": 3}, {"long": 2}, {"long": 1, "some": 1}, {"long": 1, "some": 1},
    ]  # fmt: skip
    assert report["sums"] == {"mean reward": 3.0, "some: no score (nan)": 1}


def answers(body: dict[str, Any]) -> str:
    """The longer answer is better, the length is the score; `mute` has no verdict."""
    text = body["messages"][0]["content"]
    if "mute" in text:
        return "Hm."
    if "<answer_a>" in text:
        a, b = map(len, shown(text))
        return f"Long is good.\nVerdict: {'A' if a > b else 'B' if b > a else 'tie'}"
    return f"Score: {len(text.partition('<answer>')[2].partition('</answer>')[0].strip())}"


ROWS = [
    {"id": "s", "prompt": "ask", "responses": ["x", "yyy", "zz"]},
    {"id": "p", "prompt": [{"role": "user", "content": "ask"}], "chosen": [{"role": "assistant", "content": "x"}],
     "rejected": [{"role": "assistant", "content": "yy"}]},
    {"id": "m", "prompt": "ask", "responses": ["x", "mute", "zz"]},
]  # fmt: skip


def test_judges_through_a_server_and_a_resumed_run_pays_nothing_twice(tmp_path: Path) -> None:
    with FakeOpenAI(answers) as server:
        argv = ["--scorer", "pointwise", "--scorer", "{judge: pairwise, weight: 10}", "--missing", "drop-response"]
        argv += ["--model", "big", "--url", server.url, "--price-in", "1", "--price-out", "2", "--batch", "2"]
        out, report = ran("score", *argv, output=tmp_path / "o.jsonl", rows=ROWS)
        paid = len(server.bodies)
        assert paid == (3 + 6) + (2 + 2) + (3 + 2) + (6 + 2 * 4)  # with two retries of `mute`, alone and in 4 verdicts
        again, second = ran("score", *argv, output=tmp_path / "o.jsonl", rows=ROWS)
        assert len(server.bodies) == paid
    assert again == out
    s, p, m = out
    assert [a["scores"] for a in s["responses"]] == [
        {"pointwise": 1, "pairwise": 0}, {"pointwise": 3, "pairwise": 1}, {"pointwise": 2, "pairwise": 0.5},
    ]  # fmt: skip
    assert [a["reward"] for a in s["responses"]] == [1, 13, 7]
    assert (p["chosen_reward"], p["rejected_reward"], p["preference"]) == (1, 12, 0)
    assert s["judge"]["pointwise"] == {
        "kind": "pointwise", "model": "big", "prompt": prompt_of(JudgeSpec("pointwise")).said,
    }  # fmt: skip
    assert report["options"]["scorers"][1]["prompt"]["sha256"] == prompt_of(JudgeSpec("pairwise")).sha256
    assert [(a["content"], a["reward"]) for a in m["responses"]] == [("x", 1), ("zz", 12)]
    assert [(u["content"], u["scorer"]) for u in m["unscored"]] == [("mute", "pointwise"), ("mute", "pairwise")]
    sums = report["sums"]
    assert sums["pairwise: comparisons"] == 3 + 1 + 1
    assert sums["pairwise: verdicts missing: no verdict on the last line"] == 4
    assert sums["pairwise: verdicts asked for again"] == 8
    assert sums["cost ($)"] > 0
    assert second["sums"] == sums


def test_two_judges_of_two_models_and_one_that_starts_from_the_best(tmp_path: Path) -> None:
    with FakeOpenAI(answers) as server:
        file = tmp_path / "scorers.yaml"
        file.write_text(
            f"""scorers:
              - {mine(tmp_path, "long", weight=0)}
              - {{judge: pairwise, name: small, model: little, pairs: best_vs_rest, best_by: long}}
              - {{judge: pointwise, scale: [0, 5]}}
            """
        )
        argv = ["--scorers", str(file), "--model", "big", "--url", server.url, "--merge", "first"]
        out, _ = ran("score", *argv, output=tmp_path / "o.jsonl", rows=ROWS[:1])
        assert Counter(b["model"] for b in server.bodies) == {"little": 4, "big": 3}
    assert [a["reward"] for a in out[0]["responses"]] == [0, 1, 0]
    assert [a["scores"]["pointwise"] for a in out[0]["responses"]] == [1, 3, 2]
    assert {k: v["model"] for k, v in out[0]["judge"].items()} == {"small": "little", "pointwise": "big"}
    assert len(read(tmp_path / "o.jsonl.small.calls.jsonl")) == 4
    assert len(read(tmp_path / "o.jsonl.calls.jsonl")) == 3


def test_the_command_lines_key_goes_to_no_server_of_a_judges_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "sk-of-the-first-server")
    with FakeOpenAI(answers) as server, FakeOpenAI(answers) as other:
        own = f"{{judge: pointwise, scale: [0, 5], name: own, url: '{other.url}'}}"
        argv = ["--scorer", own, "--scorer", "{judge: pointwise, scale: [0, 5]}", "--key-env", "MY_KEY"]
        ran("score", *argv, "--model", "m", "--url", server.url, output=tmp_path / "o.jsonl", rows=ROWS[:1])
        assert {h["authorization"] for h in server.headers} == {"Bearer sk-of-the-first-server"}
        assert {h["authorization"] for h in other.headers} == {"Bearer none"}


def test_a_model_in_this_process_judges(tmp_path: Path, models: Path) -> None:  # noqa: F811
    """A tiny one says nothing that could be read; that is counted, and every row goes."""
    argv = ["--scorer", "{judge: pointwise, max_tokens: 4, retries_unparsed: 1}", "--missing", "drop-row"]
    out, report = ran("score", *argv, "--model", str(models / "policy"), "--device", "cpu",
                      output=tmp_path / "o.jsonl", rows=ROWS[:1])  # fmt: skip
    assert out == []
    assert sum(report["dropped"].values()) == 1
    assert report["sums"]["pointwise: verdicts"] == 3
    assert report["sums"]["pointwise: verdicts asked for again"] == 3


def test_scores_of_reward_models_can_be_selected_and_mended_by(tmp_path: Path, models: Path) -> None:  # noqa: F811
    """score -> subset unsure (spread of the scorers), score -> repair strength (their margins)."""
    implicit = {"kind": "implicit", "reference": str(models / "reference"), "dtype": "float32"}
    scorers = [{"model": str(models / "rm"), "name": "bt", "options": {"dtype": "float32"}},
               {"model": str(models / "policy"), "name": "dpo", "options": implicit}]  # fmt: skip
    argv = [word for one in scorers for word in ("--scorer", json.dumps(one))] + [
        "--merge",
        "zscore",
        "--device",
        "cpu",
    ]
    sets = [{"id": f"s{i}", "prompt": "w1 ", "responses": [f"w{i}", f"w{i + 1} w3", f"w{i + 2}"]} for i in range(4)]
    scored, report = ran("score", *argv, output=tmp_path / "sets.jsonl", rows=sets)
    assert report["kept"] == 4
    assert [sum(a["reward"] for a in r["responses"]) for r in scored] == pytest.approx([0] * 4)
    unsure, _ = ran("subset", "unsure", "--", "--measure", "spread", output=tmp_path / "unsure.jsonl", rows=scored)
    assert all(r["uncertainty"] > 0 for r in unsure)
    pairs = [{"id": f"p{i}", "prompt": "w1 ", "chosen": f"w{i}", "rejected": f"w{i + 1} w3"} for i in range(4)]
    scored, _ = ran("score", *argv, output=tmp_path / "pairs.jsonl", rows=pairs)
    mended, _ = ran("repair", "strength", "--", output=tmp_path / "mended.jsonl", rows=scored)
    for before, after in zip(scored, mended, strict=True):
        margins = [before["chosen_scores"][n] - before["rejected_scores"][n] for n in ("bt", "dpo")]
        assert after["strength"] == pytest.approx(abs(sum(margins)) / 2)
        assert after["flipped"] == (sum(margins) < 0)


@pytest.mark.slow
def test_actors_on_ray_give_the_same_bytes(tmp_path: Path, models: Path) -> None:  # noqa: F811
    pytest.importorskip("ray.data", reason="the extra `ray` is not installed")
    source = write(
        tmp_path / "in.jsonl", [{"id": f"s{i}", "prompt": "w1 ", "responses": [f"w{i}", "w7"]} for i in range(6)]
    )
    argv = ["--scorer", json.dumps({"model": str(models / "rm"), "options": {"dtype": "float32"}}), "--batch", "2"]
    for name, more in (("here", []), ("ray", ["--ray", "1"])):
        script("score").main([source, "-o", str(tmp_path / f"{name}.jsonl"), *argv, *more])
    assert (tmp_path / "ray.jsonl").read_bytes() == (tmp_path / "here.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "expected a scorer: --scorer 'ENTRY'"),
        (["--scorer", "mat"], "there is no verifier 'mat'. Did you mean 'math'?"),
        (["--scorer", "{verifier: math, wieght: 1}"], "[0].wieght: unknown key. Did you mean 'weight'?"),
        (["--scorer", "{judge: pairwise, pair: all}"], "[0].pair: unknown key. Did you mean 'pairs'?"),
        (["--scorer", "{judge: both, model: x}"], "[0].judge: expected one of 'pointwise', 'pairwise', got 'both'"),
        (["--scorer", "{verifier: math"], "expected a mapping as recipes have it"),
        (["--scorer", "exact", "--scorer", "{verifier: length}"], "--scorer: [1].options.target: is missing"),
        (["--scorer", "exact", "--scorer", "exact"], "'exact' is the name of two scorers"),
        (["--scorer", "{verifier: exact, name: given}"], "'given' stands for the rows' own rewards"),
        (["--scorer", "{verifier: exact, weight: 2}", "--merge", "mean"], "--merge mean reads no weights but 0 and 1"),
        (["--scorer", "{verifier: exact, weight: 0}"], "every scorer has the weight 0"),
        (["--scorer", "pairwise"], "a judge needs a model"),
        (["--scorer", "exact", "--model", "m"], "--model: is for judges"),
        (["--scorer", "pairwise", "--model", "m", "--url", "http://x", "--ray", "2"], "--ray: is for models"),
        (["--scorer", "{judge: pairwise, scale: [1, 5]}"], ".scale: a pairwise judge does not read it"),
        (["--scorer", "{judge: pairwise, pairs: best_vs_rest}"], "go together"),
        (["--scorer", "{judge: pairwise, pairs: best_vs_rest, best_by: rm}"], ".best_by: expected a scorer before"),
        (["--scorer", "{judge: pointwise, scale: [5, 1]}"], ".scale: expected the lowest and the highest"),
        (["--scorer", "{judge: pointwise, prompt: nothing.txt}", "--model", "m", "--url", "http://x"], "nothing.txt"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(tmp_path: Path, argv: list[str], said: str) -> None:
    source = write(tmp_path / "in.jsonl", ROWS)
    with pytest.raises(UserError) as e:
        script("score").main([source, "-o", str(tmp_path / "o.jsonl"), *argv])
    assert said in str(e.value)


def test_a_file_of_scorers_is_checked_as_recipes_are(tmp_path: Path) -> None:
    source, file = write(tmp_path / "in.jsonl", ROWS), tmp_path / "scorers.yaml"
    for text, said in (
        ("scorer: []", "scorer: unknown key. Did you mean 'scorers'?"),
        ("scorers: math", "scorers: expected a list of scorers, got 'math'"),
        ("scorers: [{verifier: exact, options: {colum: a}}]", "scorers[0].options.colum: unknown option"),
        ("", "expected a YAML file with `scorers:`"),
    ):
        file.write_text(text)
        with pytest.raises(UserError) as e:
            script("score").main([source, "-o", str(tmp_path / "o.jsonl"), "--scorers", str(file)])
        assert said in str(e.value)
        assert str(file) in str(e.value)


def test_a_row_without_what_a_verifier_reads_is_bad(tmp_path: Path) -> None:
    _, report = ran("score", "--scorer", "exact", "--max-bad", "9", output=tmp_path / "o.jsonl", rows=ROWS[:2])
    assert report["problems"][0] == "o-in.jsonl:1: answer: expected a value, which a scorer reads, got nothing"


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [{**ROWS[0], "answer": "x"}])
    script("score").main([source, "-o", str(tmp_path / "o.jsonl"), "--scorer", "exact", "--dry-run"])
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]
