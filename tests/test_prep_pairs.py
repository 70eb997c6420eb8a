"""Pairs from sets: rules against brute force, AIR's rules, the mix of policies, pairs that teach form, the script."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections import Counter
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from prep_support import ROOT, ran, script, write

from po.data.layout import pairs_of
from po.data.read import Record
from po.errors import UserError
from po.prep import pairing
from po.prep.pairing import Rules, air, balance, number_of, policy_of
from po.prep.pairs import MakePairs
from po.prep.specs import corrupt, corruptions, in_format
from po.spec import Source

SOURCE = Source("in.jsonl")


def made(rewards: list[float], rules: Rules, answers: list[str] | None = None) -> pairing.Pairs:
    return pairing.pairs(rewards, answers or [str(k) for k in range(len(rewards))], "prompt", rules)


@pytest.mark.parametrize("seed", range(20))
def test_air_is_what_its_rules_say_of_every_ordered_pair(seed: int) -> None:
    rewards = [random.Random(seed).randrange(12, 20) / 2 for _ in range(6)]
    mean = sum(rewards) / 6
    calm = sum((r - mean) ** 2 for r in rewards) / 6 <= 1.5
    want = {
        (a, b) for a, b in permutations(range(6), 2) if calm and 2 <= rewards[a] - rewards[b] <= 3 and rewards[a] >= 8
    }
    found = made(rewards, air())
    assert set(found.pairs) == want
    assert len(found.pairs) == len(want)
    assert (found.refused is None) == bool(want)


def test_air_draws_its_lines_where_the_paper_says() -> None:
    assert made([8.0, 6.0], air()).pairs == ((0, 1),)  # variance 1, margin 2, chosen 8: all at their ends
    assert made([8.0, 6.01], air()).refused == "margin outside the window"
    assert made([7.99, 5.9], air()).refused == "chosen reward too low"
    assert made([9.0, 6.0, 6.0], air()).refused == "variance of the rewards"  # variance 2
    assert made([9.0, 7.0, 7.0, 6.0], air()).pairs == ((0, 1), (0, 2), (0, 3))


def test_a_window_takes_both_ends_and_says_what_it_leaves_out() -> None:
    found = made([5.0, 3.0, 3.0, 1.0], Rules("all", least_margin=2, most_margin=2))
    assert found.pairs == ((0, 1), (0, 2), (1, 3), (2, 3))
    assert found.why == Counter(tie=1, margin=1)
    assert made([5.0, 3.0], Rules(least_margin=2.5)).refused == "margin outside the window"
    assert made([5.0, 3.0], Rules(), ["same", "same"]).refused == "identical answers"
    assert made([5.0, 5.0], Rules()).refused == "equal rewards"
    assert made([5.0], Rules()).refused == "fewer than two answers"


@pytest.mark.parametrize("rule", ["best_vs_worst", "best_vs_random", "adjacent", "all"])
def test_without_windows_the_rules_are_those_of_training(rule: Any) -> None:
    rewards = [2.0, 5.0, 5.0, 1.0]
    answers = [str(k) for k in range(4)]
    want = pairs_of(rewards, rule, lambda k: pairing.lot(0, "prompt", answers[k]))
    assert list(made(rewards, Rules(rule)).pairs) == [(a, b) for a, b in want if rewards[a] > rewards[b]]


def test_at_most_so_many_pairs_of_a_prompt_the_widest_first() -> None:
    found = made([1.0, 4.0, 2.0, 3.0], Rules("all", per_prompt=2))
    assert found.pairs == ((1, 0), (1, 2))
    assert found.why == Counter(per_prompt=4)


@pytest.mark.parametrize(
    ("on", "off", "share"), [(30, 10, 0.5), (7, 90, 0.5), (40, 39, 0.25), (5, 5, 1.0), (5, 5, 0.0)]
)
def test_the_mix_of_policies_keeps_as_many_as_it_can(on: int, off: int, share: float) -> None:
    drawn = {
        kind: [number_of(pairing.lot(0, kind, str(i))) for i in range(n)] for kind, n in (("on", on), ("off", off))
    }
    found = balance(drawn["on"], drawn["off"], share)
    kept = [sum(found.keeps(kind, x) for x in drawn[kind]) for kind in ("on", "off")]  # type: ignore[arg-type]
    every = [(a, b) for a in range(on + 1) for b in range(off + 1) if a + b and abs(a / (a + b) - share) < 1e-9]
    assert tuple(kept) == max(every, key=sum)
    assert not found.keeps("mixed", 0)
    assert policy_of(["me", "me", "gpt", None], (0, 1), frozenset({"me"})) == "on"
    assert policy_of(["me", "me", "gpt", None], (2, 3), frozenset({"me"})) == "off"
    assert policy_of(["me", "me", "gpt", None], (0, 2), frozenset({"me"})) == "mixed"


def scored(name: str, *rewards: float, sources: str = "", **more: Any) -> dict[str, Any]:
    answers = [{"content": f"{name}{k}", "reward": r} for k, r in enumerate(rewards)]
    for answer, source in zip(answers, sources):
        answer["source"] = source
    return {"id": name, "prompt": f"ask {name}", "responses": answers, **more}


ROWS = [scored("a", 9, 7, 6.5, sources="mmg", topic="t"), scored("b", 9, 7, 1, sources="ggg"), scored("c", 3, 3.0)]


def test_the_script_writes_pairs_that_training_reads(tmp_path: Path) -> None:
    from po.data.formats import convert

    rows, report = ran("pair", "--rule", "all", "--least-margin", "2.5", output=tmp_path / "o.jsonl", rows=ROWS[:2])
    assert [r["id"] for r in rows] == ["a/0-2", "b/0-2", "b/1-2"]
    assert rows[0] == {
        "id": "a/0-2", "prompt": "ask a", "topic": "t", "chosen": "a0", "rejected": "a2",
        "chosen_reward": 9.0, "chosen_source": "m", "rejected_reward": 6.5, "rejected_source": "g",
    }  # fmt: skip
    assert report["sums"] == {"pairs left out: margin outside the window": 3}
    row = convert(Record("w", rows[0]), SOURCE).row
    assert row is not None
    assert row.is_pair
    assert [r.reward for r in row.responses] == [9, 6.5]


def test_the_script_counts_a_tie_as_dropped_and_a_broken_row_as_bad(tmp_path: Path) -> None:
    broken = {"prompt": "x", "responses": [{"content": "y", "reward": "high"}, {"content": "z", "reward": 1}]}
    rows, report = ran("pair", "--max-bad", "1", output=tmp_path / "o.jsonl", rows=[*ROWS, broken])
    assert [r["id"] for r in rows] == ["a/0-2", "b/0-2"]
    assert report["dropped"] == {"equal rewards": 1}
    assert report["ids"] == {"equal rewards": ["c"]}
    assert report["problems"] == ["o-in.jsonl:4: responses[0].reward: expected a finite number, got 'high'"]


def test_the_script_mixes_policies_over_all_rows(tmp_path: Path) -> None:
    own = [scored(f"on{i}", 9, 7, sources="mm") for i in range(12)]
    others = [scored(f"off{i}", 9, 7, sources="gh") for i in range(5)]
    mixed = [scored("mixed", 9, 7, sources="mg")]
    rows, report = ran("pair", "--air", "--on-policy", "m", output=tmp_path / "o.jsonl", rows=own + mixed + others)
    assert Counter(r["policy"] for r in rows) == {"on": 5, "off": 5}
    assert report["dropped"] == {"on/off-policy share": 7, "neither on- nor off-policy": 1}
    again, _ = ran("pair", "--air", "--on-policy", "m", output=tmp_path / "p.jsonl", rows=others[::-1] + own[::-1])
    assert sorted(r["id"] for r in again) == sorted(r["id"] for r in rows)


def test_pairs_as_given_stay_and_must_pass_the_windows() -> None:
    pair = {"id": "p", "prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 9, "score_rejected": 2}
    assert MakePairs(SOURCE, Rules())(Record("w", pair)).rows[0]["id"] == "p"
    assert MakePairs(SOURCE, air())(Record("w", pair)).dropped == "variance of the rewards"
    bare = {"prompt": "q", "chosen": "a", "rejected": "b"}
    assert len(MakePairs(SOURCE, Rules())(Record("w", bare)).rows) == 1
    assert MakePairs(SOURCE, Rules(least_margin=1))(Record("w", bare)).dropped == (
        "a pair without rewards, which the rules need"
    )


def test_the_responses_form_keeps_what_was_sampled() -> None:
    row = scored("a", 1, 5, 3, prompt_ids=[1])
    for k, answer in enumerate(row["responses"]):
        answer |= {"token_ids": [k, 2], "logps": [-1.0, -0.5]}
    out = MakePairs(SOURCE, Rules(), "responses")(Record("w", row)).rows[0]
    assert [a["token_ids"] for a in out["responses"]] == [(1, 2), (0, 2)]
    assert out["prompt_ids"] == (1,)
    json.dumps(out)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--rule", "margin"], "--rule margin: expected --least-margin as well"),
        (["--air"], "the share of on-policy pairs needs --on-policy MODEL"),
        (["--on-policy", "m", "--on-policy-share", "2"], "--on-policy-share: expected 0 to 1, got 2"),
        (["--rule", "format", "--air"], "--rule format: goes with --tags, --right and --seed alone"),
    ],
)
def test_the_script_refuses_what_does_not_go_together(tmp_path: Path, argv: list[str], said: str) -> None:
    source = write(tmp_path / "in.jsonl", ROWS)
    with pytest.raises(UserError) as e:
        script("pair").main([source, "-o", str(tmp_path / "o.jsonl"), *argv])
    assert said in str(e.value)


TAGS = ("think", "answer")
GOOD = "<think>2 and 2</think>\n<answer>4</answer>"


def test_every_corruption_breaks_the_form_and_keeps_the_words() -> None:
    assert in_format(GOOD, TAGS)
    made = corruptions(GOOD, TAGS)
    assert len(made) == 10
    for broken in made.values():
        assert not in_format(broken, TAGS)
        words = re.sub(r"[<\[]/?(think|answer)[>\]]", " ", broken).split()
        assert sorted(words) == sorted(["2", "and", "2", "4"])
    assert len({corrupt(GOOD, TAGS, pairing.lot(s))[0] for s in range(100)}) == 10
    for text in ("4", GOOD + "!", GOOD + GOOD, "<answer>4</answer><think>x</think>", "<think><think>x</think></think>"):
        assert not in_format(text, TAGS)


def test_format_pairs_come_from_right_answers_in_the_format(tmp_path: Path) -> None:
    answers = [{"content": GOOD, "reward": 1, "logps": [-1.0]}, {"content": "4", "reward": 2, "logps": [-1.0]}]
    wrong = {"id": "w", "prompt": "2+2", "responses": [{**a, "reward": a["reward"] - 2} for a in answers]}
    plain = {"id": "n", "prompt": "2+2", "responses": [{**answers[1], "content": c} for c in "45"]}
    rows = [{"id": "r", "prompt": "2+2", "responses": answers}, wrong, plain]
    out, report = ran("pair", "--rule", "format", output=tmp_path / "o.jsonl", rows=rows)
    assert [r["id"] for r in out] == ["r/0-format"]
    assert out[0]["chosen"] == GOOD
    assert out[0]["rejected"] == corruptions(GOOD, TAGS)[out[0]["corruption"]]
    assert set(out[0]) == {"id", "prompt", "chosen", "rejected", "corruption"}
    assert report["dropped"] == {"no right answer": 1, "no right answer in the format": 1}


@pytest.mark.parametrize("name", ["pair", *(pytest.param(n, marks=pytest.mark.slow) for n in ("subset", "repair"))])
def test_scripts_run_by_themselves_with_help_and_exit_codes(tmp_path: Path, name: str) -> None:
    assert f"example:\n  python data_prep/{name}.py" in script(name).arguments().format_help()
    kind = {"pair": [], "subset": ["weights"], "repair": ["strength"]}[name]
    command = [sys.executable, str(ROOT / "data_prep" / f"{name}.py"), *kind, "nothing.jsonl", "-o", "out.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: nothing.jsonl not found")
