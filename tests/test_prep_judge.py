"""Judges: verdicts read strictly, both orders, win shares, what is missing, prompts; by hand."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from po.data.read import Record
from po.errors import UserError
from po.prep.chat import Answer, Ask, Reply
from po.prep.judge import Judge, Lacking, decide, read_score, read_verdict, win_shares
from po.prep.judge_spec import POINTWISE, JudgeSpec, prompt_of
from po.prep.rows import EVERYTHING, ScoredSet, read_set
from po.spec import Source

SOURCE = Source("in.jsonl")


def a_set(*texts: str, **more: Any) -> ScoredSet:
    data = {"prompt": "Which?", "responses": [{"content": t, "label": None} for t in texts], **more}
    found = read_set(Record("in.jsonl:1", data), SOURCE, EVERYTHING)
    assert isinstance(found, ScoredSet)
    return found


class Said:
    """A Chat that says what a function of a request's text and number says."""

    name = "said"

    def __init__(self, answer: Callable[[str, Ask], str | Answer]) -> None:
        self.answer, self.asked = answer, list[Ask]()

    def ask(self, asks: Any) -> list[Answer]:
        self.asked += asks
        found = [self.answer(str(a.messages[0]["content"]), a) for a in asks]
        return [Answer((Reply(f, "stop"),)) if isinstance(f, str) else f for f in found]


def judge(kind: Any, answer: Callable[[str, Ask], str | Answer], **spec: Any) -> tuple[Judge, Said]:
    chat, one = Said(answer), JudgeSpec(kind, **spec)
    return Judge(kind, one, chat, prompt_of(one)), chat


def rounds(judge: Judge, read: ScoredSet, best: int | None = None) -> tuple[list[Any], Counter[str]]:
    """A judge's generator by hand."""
    counts = Counter[str]()
    made = judge.rounds(read, best, counts)
    try:
        asks = next(made)
        while True:
            asks = made.send(judge.chat.ask(asks))
    except StopIteration as end:
        return end.value, +counts


def shown(text: str) -> tuple[str, str]:
    """What a pairwise request shows as A and as B."""
    a = text.partition("<answer_a>\n")[2].partition("\n</answer_a>")[0]
    return a, text.partition("<answer_b>\n")[2].partition("\n</answer_b>")[0]


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("Fine.\nScore: 7", 7.0),
        ("Fine.\n\n**Score: 7.5**\n\n", 7.5),
        ("score : 10/10.", 10.0),
        ("Score: 7/5", "outside the scale"),
        ("Score: 11", "outside the scale"),
        ("Score: -3", "outside the scale"),
        ("Score: 7\nBut it is long.", "no verdict on the last line"),
        ("Score: seven", "no verdict on the last line"),
        ("7", "no verdict on the last line"),
        ("", "no verdict on the last line"),
        ("Score: 3\nScore: 7", "several verdicts"),
    ],
)
def test_a_score_is_read_strictly(text: str, want: float | str) -> None:
    found = read_score(text, (1, 10))
    assert (found.kind if isinstance(found, Lacking) else found) == want


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("A is right.\nVerdict: A", "a"),
        ("**Verdict: [[B]]**", "b"),
        ("Verdict: tie.", "tie"),
        ("Verdict: A or B", "no verdict on the last line"),
        ("A", "no verdict on the last line"),
        ("Verdict: A\nVerdict: B", "several verdicts"),
    ],
)
def test_a_verdict_is_read_strictly(text: str, want: str) -> None:
    found = read_verdict(text)
    assert (found.kind if isinstance(found, Lacking) else found) == want


def test_both_orders_must_agree() -> None:
    """All nine: the verdict with the first answer shown as A, then with it shown as B."""
    want = {("a", "b"): 1.0, ("b", "a"): 0.0, ("tie", "tie"): 0.5}
    counts = Counter[str]()
    for first in ("a", "b", "tie"):
        for second in ("a", "b", "tie"):
            assert decide(first, second, counts) == want.get((first, second), 0.5)
    assert counts == {
        "comparisons": 9,
        "comparisons that depend on the order": 6,
        "comparisons won by the first shown both times": 1,
        "comparisons won by the second shown both times": 1,
        "ties in both orders": 1,
    }


def test_win_shares_by_hand() -> None:
    assert win_shares(3, {(0, 1): 1.0, (0, 2): 0.5, (1, 2): 0.0}) == [0.75, 0.0, 0.75]
    assert win_shares(3, {(1, 0): 1.0, (1, 2): 0.5}) == [0.0, 0.75, 0.5]
    assert win_shares(1, {}) == [None]
    lost = Lacking("cut off at max_tokens")
    assert win_shares(2, {(0, 1): lost}) == [lost, lost]
    assert win_shares(3, {(0, 1): lost, (0, 2): 1.0, (1, 2): lost}) == [1.0, lost, 0.0]
    assert win_shares(3, {(0, 1): 1.0, (0, 2): lost, (1, 2): 0.0}) == [1.0, 0.0, lost]
    assert win_shares(3, {(1, 0): lost, (1, 2): 0.5}) == [lost, 0.5, 0.5]  # the best stays
    assert win_shares(3, {(1, 0): lost, (1, 2): lost}) == [lost, lost, lost]


def test_a_pairwise_judge_compares_all_in_both_orders() -> None:
    better = {"w": 3, "x": 2, "y": 1}
    one, chat = judge("pairwise", lambda t, _: f"Verdict: {'AB'[better[shown(t)[0]] < better[shown(t)[1]]]}")
    found, counts = rounds(one, a_set("x", "w", "y"))
    assert found == [0.5, 1.0, 0.0]
    assert sorted(shown(str(a.messages[0]["content"])) for a in chat.asked) == sorted(
        (a, b) for a in "wxy" for b in "wxy" if a != b
    )
    assert counts == {"comparisons": 3, "verdicts": 6}
    assert len({a.seed for a in chat.asked}) == 6
    assert {a.temperature for a in chat.asked} == {0.0}


def test_a_judge_that_only_sees_places_says_nothing() -> None:
    one, _ = judge("pairwise", lambda *_: "Verdict: A")
    found, counts = rounds(one, a_set("x", "y"))
    assert found == [0.5, 0.5]
    assert counts["comparisons that depend on the order"] == 1
    assert counts["comparisons won by the first shown both times"] == 1


def test_the_best_against_the_rest_asks_less() -> None:
    one, chat = judge("pairwise", lambda t, _: f"Verdict: {'AB'[shown(t)[0] > shown(t)[1]]}")
    found, _ = rounds(one, a_set("b", "c", "a", "c"), 1)
    assert found == [1.0, pytest.approx(0.5 / 3), 1.0, 0.5]  # c loses to b and a, and ties with c unasked
    assert len(chat.asked) == 4


def test_an_unreadable_verdict_is_asked_for_again_with_another_seed_and_then_is_none() -> None:
    def answer(text: str, ask: Ask) -> str:
        return "Score: 4" if "good" in text and ask.seed in seeds and ask.temperature == 0.7 else "I cannot say."

    one, chat = judge("pointwise", answer)
    first = one._ask("Which?", response="good").seed
    seeds = {first + 2}  # the second retry
    found, counts = rounds(one, a_set("good", "bad"))
    assert found == [4.0, Lacking("no verdict on the last line", "'I cannot say.'")]
    assert counts == {
        "verdicts": 2,
        "verdicts asked for again": 4,
        "verdicts missing: no verdict on the last line": 1,
    }
    assert len(chat.asked) == 6
    assert [a.temperature for a in chat.asked] == [0.0, 0.0, 0.7, 0.7, 0.7, 0.7]


def test_a_request_that_failed_is_not_asked_again_and_a_cut_one_is_named() -> None:
    one, chat = judge("pointwise", lambda *_: Answer(problem="HTTP 500"))
    assert rounds(one, a_set("x", "y"))[0] == [Lacking("no answer", "HTTP 500")] * 2
    assert len(chat.asked) == 2
    one, _ = judge("pointwise", lambda *_: Answer((Reply("Score: 4 perha", "length"),)), retries_unparsed=0)
    assert rounds(one, a_set("x", "y"))[0][0].kind == "cut off at max_tokens"


def test_prompts_have_an_id_a_version_and_the_hash_of_what_is_asked(tmp_path: Path) -> None:
    text = POINTWISE.replace("LOW", "1").replace("HIGH", "10")
    want = {"id": "pointwise", "version": "1", "sha256": hashlib.sha256(text.encode()).hexdigest()}
    assert prompt_of(JudgeSpec("pointwise")).said == want
    assert prompt_of(JudgeSpec("pointwise", scale=(0, 5))).said["sha256"] != want["sha256"]
    file = tmp_path / "mine.txt"
    file.write_text("Is {response} good for {prompt}? Score: N")
    mine = prompt_of(JudgeSpec("pointwise", prompt=str(file)))
    assert mine.said == {"id": "pointwise", "version": "file", "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    asked = mine.fill(prompt="{response}", response="{prompt}")
    assert asked == "Is {prompt} good for {response}? Score: N"
    with pytest.raises(UserError, match=r"expected \{response_a\} in the text"):
        prompt_of(JudgeSpec("pairwise", prompt=str(file)))
