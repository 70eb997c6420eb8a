"""spar, self_rewarding, pu_rl and steps: their rounds by hand-made answers, what must hold of any data, the script."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from fake_openai import Body, FakeOpenAI, completion
from prep_support import read, script, write
from test_trainer import logs
from tiny import make_model, write_recipe

from po.data.formats import convert
from po.data.read import Record
from po.data.wanted import Wanted
from po.errors import UserError
from po.prep.anchors import PURL
from po.prep.chat import TEXT, Answer, Ask, Dialogue, Reply
from po.prep.contrast import Sampling
from po.prep.pits import Steps, split_steps, value
from po.prep.search_prompts import POINTS as POINTS_PROMPT
from po.prep.second import Second
from po.prep.self_rewarding import Said, SelfRewarding, agreement
from po.prep.step import Outcome
from po.prep.tree import Spar
from po.prep.verdicts import Vote, p_yes, points
from po.recipe import load
from po.run import train
from po.spec import Source

SOURCE = Source("in.jsonl")
Speak = Callable[[Ask], Sequence[str] | Answer]


def played(dialogue: Dialogue, speak: Speak) -> tuple[Outcome, list[list[Ask]]]:
    """A dialogue's end, and what it asked round by round."""
    rounds: list[list[Ask]] = []
    answers: list[Answer] | None = None
    try:
        while True:
            asks = next(dialogue) if answers is None else dialogue.send(answers)
            rounds.append(asks)
            answers = [_answer(speak(a)) for a in asks]
    except StopIteration as end:
        return end.value, rounds


def _answer(said: Sequence[str] | Answer) -> Answer:
    return said if isinstance(said, Answer) else Answer(tuple(Reply(t, "stop") for t in said))


def part(ask: Ask, tag: str) -> str:
    """What stands between a tag in a request."""
    found = re.search(rf"<{tag}>\n(.*?)\n</{tag}>", ask.messages[-1]["content"], re.DOTALL)
    assert found is not None
    return found[1]


def is_judging(ask: Ask) -> bool:
    return "Verdict:" in ask.messages[-1]["content"]


# --- verdicts


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("Fine.\nScore: 4", 4),
        ("**Score: 5/5**", 5),
        ("Score: 0\n", 0),
        ('"Score: 3".', 3),
        ("Score: -3", None),
        ("Score: 6", None),
        ("Score: 45", None),
        ("Score: 4.5", None),
        ("Score: .5", None),
        ("Score: 3/10", None),
        ("Score: 4\nor so", None),
        ("Score: 2\nScore: 3", None),
        ("a score of 4", None),
        ("", None),
    ],
)
def test_points_are_read_from_their_own_last_line_alone(text: str, want: int | None) -> None:
    assert points(text) == want


def test_votes_count_what_can_be_read_and_keep_the_first_reason_against() -> None:
    vote = Vote.of(["Verdict: yes", "Verdict: no", "too short\n*Verdict: No*", "no", "Verdict: yes\nVerdict: no"])
    assert vote == Vote(1, 2, 2, "too short")
    assert vote.value == 1 / 3
    assert Vote.of(["maybe"]).value is None


def test_p_yes_adds_up_spellings() -> None:
    top = ({"Yes": math.log(0.3), " yes": math.log(0.1), "No": math.log(0.1), "Hm": math.log(0.5)},)
    assert p_yes(top) == pytest.approx(0.8)
    assert p_yes(({"Hm": -0.1},)) is None
    assert p_yes(None) is None


# --- spar

NEGATIVE = {"id": "n", "prompt": "Write abc.", "responses": [{"content": "r"}, {"content": "good"}], "topic": "t"}


def world(passes: Mapping[str, int], critic: bool = True, votes: int = 5) -> Speak:
    """A model whose refinements of r are r0, r1, r2, and of r0 r00 ...; passes: how many votes each text gets."""

    def speak(ask: Ask) -> Sequence[str]:
        text = part(ask, "answer")
        if is_judging(ask):
            yes = passes.get(text, 0)
            against = "it lacks something\nVerdict: no" if critic else "Verdict: no"
            return ["Verdict: yes"] * yes + [against] * (votes - yes)
        return [f"[[REFINED]]\n{text}{k}" for k in range(ask.n)]

    return speak


def spar(row: Mapping[str, Any] = NEGATIVE, **options: Any) -> Dialogue:
    return Spar(SOURCE, "m", **options)(Record("w", dict(row)))


def expanded(rounds: Sequence[Sequence[Ask]]) -> list[list[str]]:
    """The texts that were refined, round by round."""
    return [[part(a, "answer") for a in asks] for asks in rounds if asks and not is_judging(asks[0])]


def test_spar_pairs_the_first_refinement_that_a_majority_passes_with_the_answer_that_failed() -> None:
    outcome, rounds = played(spar(), world({"good": 5, "r1": 3, "r2": 4}))
    (row,) = outcome.rows
    assert row["id"] == "n/0-spar"
    assert (row["prompt"], row["topic"]) == ("Write abc.", "t")
    assert (row["chosen"], row["rejected"]) == ("r2", "r")  # the higher value of two that passed
    assert (row["chosen_value"], row["rejected_value"], row["chosen_source"]) == (0.8, 0.0, "m")
    assert (row["contrast"]["nodes"], row["contrast"]["depth"]) == (3, 1)
    assert [p["id"] for p in row["contrast"]["prompts"]] == ["spar-judge", "spar-refine"]
    assert [len(asks) for asks in rounds] == [2, 1, 3]
    assert {(a.n, a.temperature) for asks in rounds for a in asks} == {(5, 0.7), (3, 0.7)}
    assert outcome.sums["nodes"] == 3
    assert outcome.sums["verdicts"] == 25
    read_back = convert(Record("w", row), SOURCE).row
    assert read_back is not None
    assert read_back.is_pair


def test_spar_shows_the_refiner_what_the_judge_found() -> None:
    _, rounds = played(spar(), world({"good": 5}))
    assert part(rounds[1][0], "found") == "it lacks something"
    assert part(rounds[1][0], "task") == "Write abc."


def test_spar_by_breadth_goes_on_with_the_two_highest_values_of_each_level() -> None:
    passes = {"good": 5, "r0": 1, "r1": 2, "r2": 1, "r12": 2, "r00": 1}
    outcome, rounds = played(spar(), world(passes))
    assert expanded(rounds) == [["r"], ["r1", "r0"], ["r12", "r00"]]
    assert outcome.dropped == "no refinement passed"
    assert outcome.sums["nodes"] == 3 + 6 + 6
    assert outcome.sums["verdicts"] == 5 * (2 + 15)
    assert "searches ended by the budget" not in outcome.sums


def test_spar_by_depth_goes_down_the_highest_value_first() -> None:
    passes = {"good": 5, "r1": 2, "r2": 1, "r10": 1, "r22": 1, "r220": 5}
    outcome, rounds = played(spar(order="dfs", budget=100), world(passes))
    assert expanded(rounds) == [["r"], ["r1"], ["r10"], ["r11"], ["r2"], ["r22"]]
    assert outcome.rows[0]["chosen"] == "r220"
    assert outcome.rows[0]["contrast"]["depth"] == 3


@pytest.mark.parametrize("order", ["bfs", "dfs"])
@pytest.mark.parametrize("budget", [1, 2, 3, 4, 7, 15])
def test_spar_never_tries_more_answers_than_its_budget(order: Any, budget: int) -> None:
    outcome, rounds = played(spar(order=order, budget=budget), world({"good": 5}))
    tried = sum(a.n for asks in rounds for a in asks if not is_judging(a))
    assert tried == outcome.sums["nodes"] == budget
    # at a budget of 15 breadth is through, depth is not
    assert ("searches ended by the budget" in outcome.sums) == (budget < 15 or order == "dfs")


@pytest.mark.parametrize(("branch", "keep", "depth"), [(1, 1, 1), (2, 1, 3), (2, 2, 2), (3, 5, 2)])
def test_the_shape_of_a_tree_that_finds_nothing(branch: int, keep: int, depth: int) -> None:
    for order in ("bfs", "dfs"):
        outcome, rounds = played(
            spar(order=order, branch=branch, keep=keep, depth=depth, budget=1000), world({"good": 5})
        )
        want, level = 0, 1
        levels = []
        for _ in range(depth):
            levels.append(level)
            want += level * branch
            level = min(keep, level * branch) if order == "bfs" else level * min(keep, branch)
        assert outcome.sums["nodes"] == want
        if order == "bfs":
            assert list(map(len, expanded(rounds))) == levels


def test_spar_removes_children_without_a_critique() -> None:
    def speak(ask: Ask) -> Sequence[str] | Answer:
        if is_judging(ask) and part(ask, "answer") in ("r0", "r1"):
            return ["Verdict: no"] * 5
        return world({"good": 5})(ask)

    outcome, rounds = played(spar(depth=2), speak)
    assert expanded(rounds) == [["r"], ["r2"]]
    assert outcome.sums["nodes removed: no critique"] == 2
    assert played(spar(), world({"good": 5}, critic=False))[0].dropped == "no answer that the majority fails"


def test_spar_removes_what_cannot_be_read_or_was_there_before() -> None:
    def speak(ask: Ask) -> Sequence[str] | Answer:
        if is_judging(ask):
            return world({"good": 5})(ask)
        cut = Reply("[[REFINED]]\nhalf of", "length")
        return Answer((Reply("[[REFINED]] r", "stop"), Reply("no mark", "stop"), cut))

    outcome, rounds = played(spar(), speak)
    assert len(rounds) == 2
    assert outcome.dropped == "no refinement passed"
    assert {k: v for k, v in outcome.sums.items() if k.startswith("nodes removed")} == {
        "nodes removed: seen before": 1,
        "nodes removed: no marker in the reply": 1,
        "nodes removed: a reply cut at --max-tokens": 1,
    }


def test_spar_counts_ties_and_verdicts_that_cannot_be_read_and_begins_with_neither() -> None:
    said = {"tie": ["Verdict: yes", "x\nVerdict: no", "?", "", "yes"], "mute": ["?"] * 5, "fine": ["Verdict: yes"] * 5}
    row = {"id": "n", "prompt": "p", "responses": list(said)}
    outcome, rounds = played(spar(row), lambda ask: said[part(ask, "answer")])
    assert outcome.dropped == "no answer that the majority fails"
    assert len(rounds) == 1
    assert outcome.sums == {
        "answers with a tie": 1,
        "answers without a readable verdict": 1,
        "answers passed": 1,
        "verdicts": 15,
        "verdicts not readable": 8,
    }


def test_spar_of_a_pair_begins_with_the_rejected_side_and_per_prompt_limits_sets() -> None:
    pair = {"id": "p", "prompt": "q", "chosen": "x", "rejected": "r"}
    outcome, rounds = played(spar(pair), world({"r1": 5}))
    assert [part(a, "answer") for a in rounds[0]] == ["r"]
    assert (outcome.rows[0]["chosen"], outcome.rows[0]["rejected"]) == ("r1", "r")
    three = {"id": "s", "prompt": "q", "responses": ["a", "b", "c"]}
    outcome, _ = played(spar(three, per_prompt=2), world({"a1": 5, "b0": 3}))
    assert [(r["id"], r["chosen"]) for r in outcome.rows] == [("s/0-spar", "a1"), ("s/1-spar", "b0")]
    assert outcome.sums["failed answers beyond --per-prompt"] == 1


def test_spar_answers_conversations_with_messages() -> None:
    talk = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "?"},
        {"role": "user", "content": "abc"},
    ]
    outcome, rounds = played(spar({"prompt": talk, "responses": ["r", "good"]}), world({"good": 5, "r0": 5}))
    assert part(rounds[0][0], "task") == "User: Hi\n\nAssistant: ?\n\nUser: abc"
    assert outcome.rows[0]["chosen"] == [{"role": "assistant", "content": "r0"}]


def test_a_request_without_an_answer_drops_the_row_by_its_name_and_keeps_the_counts() -> None:
    def speak(ask: Ask) -> Sequence[str] | Answer:
        return world({"good": 5})(ask) if is_judging(ask) else Answer(problem="HTTP 500")

    outcome, _ = played(spar(), speak)
    assert outcome.dropped == "no answer: HTTP 500"
    assert outcome.sums["verdicts"] == 10


def test_requests_differ_in_their_seeds_and_depend_on_the_given_one() -> None:
    seeds = [
        [a.seed for asks in played(spar(sampling=Sampling(seed=s)), world({"good": 5}))[1] for a in asks]
        for s in (0, 0, 1)
    ]
    assert seeds[0] == seeds[1]
    assert len(set(seeds[0])) == len(seeds[0])
    assert not set(seeds[0]) & set(seeds[2])


# --- self_rewarding and CREAM


def test_agreement_is_the_methods_vector() -> None:
    assert agreement([0.9, 0.1, 0.5, 0.3, 0.7], [0.8, 0.2, 0.1, 0.4, 0.9]) == pytest.approx(0.7)


@pytest.mark.parametrize("seed", range(20))
def test_what_holds_of_agreement_whatever_the_rankings(seed: int) -> None:
    draw = random.Random(seed)
    now, before = ([draw.randrange(6) for _ in range(5)] for _ in range(2))
    order = draw.sample(range(5), 5)
    c = agreement(now, before)
    assert 0 <= c <= 1
    assert agreement(before, now) == pytest.approx(c)
    assert agreement([now[i] for i in order], [before[i] for i in order]) == pytest.approx(c)
    assert agreement(now, [-b for b in before]) == pytest.approx(1 - c)
    assert agreement([3 * n + 1 for n in now], before) == pytest.approx(c)
    different = draw.sample(range(100), 5)
    assert agreement(different, different) == 1
    assert agreement(different, [1] * 5) == 0.5


def test_top_agreement_looks_at_the_best_and_the_worst_and_not_at_the_first_and_the_last() -> None:
    assert agreement([2, 1, 3, 0], [5, 6, 9, 2], "top") == 1
    assert agreement([2, 1, 3, 0], [2, 1, 0, 3], "top") == 0
    assert agreement([2, 3, 0, 1], [2, 0, 3, 1], "top") == 0  # where first and last agree


@pytest.mark.parametrize(
    ("names", "want"),
    [
        (("reward",), 2.0),
        (("scores.judge",), 4.5),
        (("logps",), -3.0),
        (("logps", "ref_logps"), 1.0),
        (("ref_logps.1",), None),
        (("nothing",), None),
        (("logps", "nothing"), None),
        (("content",), None),
        (("flag",), None),
    ],
)
def test_scores_are_read_from_the_fields_that_are_named(names: tuple[str, ...], want: float | None) -> None:
    logps = {"logps": (-1.0, -2.0), "ref_logps": [-4.0]}
    answer = {"content": "x", "reward": 2, "scores": {"judge": 4.5}, "flag": True, **logps}
    assert Said(names).of(answer) == want


POINTS = {"a": (4, 5, 5), "b": (1, 1, 0), "c": (3, 3, 3)}
SET = {"id": "s", "prompt": "q", "responses": ["b", "a", "c"], "topic": "t"}


def judged(said: Mapping[str, Sequence[int | str]]) -> Speak:
    return lambda ask: [s if isinstance(s, str) else f"So.\nScore: {s}" for s in said[part(ask, "reply")]]


def rewarding(row: Mapping[str, Any] = SET, **options: Any) -> Dialogue:
    return SelfRewarding(SOURCE, **options)(Record("w", dict(row)))


def test_a_model_pairs_the_best_of_its_answers_with_the_worst() -> None:
    outcome, rounds = played(rewarding(), judged(POINTS))
    (row,) = outcome.rows
    assert row == {
        "id": "s/1-0", "prompt": "q", "topic": "t", "chosen": "a", "rejected": "b",
        "chosen_reward": 14 / 3, "rejected_reward": 2 / 3,
        "contrast": {"strategy": "self_rewarding", "prompts": [POINTS_PROMPT.said]},
    }  # fmt: skip
    assert [len(asks) for asks in rounds] == [3]
    assert {(a.n, type(a)) for a in rounds[0]} == {(3, Ask)}
    assert outcome.sums["verdicts"] == 9


def test_an_answer_none_of_whose_verdicts_can_be_read_is_left_out() -> None:
    outcome, _ = played(rewarding(), judged({**POINTS, "b": ("good", "Score: 9", "Score: 1 or 2"), "c": ("?", 3, 3)}))
    assert (outcome.rows[0]["chosen"], outcome.rows[0]["rejected"]) == ("a", "c")
    assert outcome.rows[0]["rejected_reward"] == 3
    assert outcome.sums["verdicts not readable"] == 4
    assert outcome.sums["answers without a score"] == 1
    outcome, _ = played(rewarding(), judged({"a": (1, 1, 1), "b": (1, 1, 1), "c": (0, 1, 2)}))
    assert outcome.dropped == "equal rewards"
    outcome, _ = played(rewarding(), judged({"a": (1, 1, 1), "b": "???", "c": "???"}))
    assert outcome.dropped == "fewer than two answers"


def test_the_iteration_before_judges_too_and_its_ranking_becomes_the_consistency() -> None:
    before = {"a": (0, 0, 0), "b": (2, 2, 2), "c": (3, 3, 3)}

    def speak(ask: Ask) -> Sequence[str] | Answer:
        return judged(before if isinstance(ask, Second) else POINTS)(ask)

    outcome, rounds = played(rewarding(before=None), speak)
    # pairs of a b c: a over b, over c, c over b now; b over a, c over a, c over b before: tau = (1 - 2) / 3
    assert outcome.rows[0]["consistency"] == pytest.approx(1 / 3)
    assert outcome.sums["pairs that CREAM turns over (consistency below 1/2)"] == 1
    assert Counter(type(a) for a in rounds[0]) == {Ask: 3, Second: 3}
    assert len(rounds) == 1


def test_an_answer_without_an_earlier_score_takes_no_part_and_shifts_no_other() -> None:
    numbers = [(1.0, 5.0), (2.0, None), (3.0, 7.0), (4.0, 6.0)]
    answers = [{"content": f"y{k}", "now": n, "old": o} for k, (n, o) in enumerate(numbers)]
    row = {"id": "s", "prompt": "q", "responses": answers}
    outcome, rounds = played(rewarding(row, now=Said(("now",)), before=Said(("old",))), judged({}))
    assert not any(rounds)
    assert outcome.rows[0]["id"] == "s/3-0"
    assert outcome.rows[0]["consistency"] == pytest.approx((1 + 1 / 3) / 2)
    assert outcome.sums["answers without a score"] == 1


def test_a_constant_consistency_is_written_in_every_row_and_the_row_keeps_its_own() -> None:
    answers = [{"content": c, "logps": [x], "ref_logps": [0.0], "old": -x} for c, x in zip("ab", (-1.0, -2.0))]
    options = {"now": Said(("logps", "ref_logps")), "before": Said(("old",)), "constant": 0.75}
    outcome, _ = played(rewarding({"prompt": "q", "responses": answers}, **options), judged({}))
    (row,) = outcome.rows
    assert (row["chosen"], row["consistency"], row["own_consistency"]) == ("a", 0.75, 0.0)
    assert convert(Record("w", row), SOURCE).row is not None


# --- pu_rl


def likely(p: float) -> Answer:
    return Answer((Reply("yes", "length", top=({"yes": math.log(p), " No": math.log(1 - p)},)),))


def preferring(quality: Mapping[str, float], first: float = 0.0) -> Speak:
    """A model that says yes by how much better the asked one is, and has a liking for what it sees first."""

    def speak(ask: Ask) -> Answer:
        one, other = quality[part(ask, "first")] + first, quality[part(ask, "second")]
        if "Is the second\nreply" in ask.messages[0]["content"]:
            one, other = other, one
        return likely(1 / (1 + math.exp(other - one)))

    return speak


QUALITY = {"T": 2.0, "a": 1.0, "b": -1.0, "c": 0.5, "d": 3.0}
ANCHORED = {"id": "s", "prompt": "q", "anchor": "T", "responses": ["a", "b", "c", "d"]}


def pu_rl(row: Mapping[str, Any] = ANCHORED, **options: Any) -> Dialogue:
    return PURL(SOURCE, "m", **options)(Record("w", dict(row)))


@pytest.mark.parametrize("compare", ["anchor", "each_other"])
def test_candidates_are_ranked_by_comparisons_in_both_orders(compare: Any) -> None:
    outcome, rounds = played(pu_rl(compare=compare), preferring(QUALITY, first=1.5))
    (row,) = outcome.rows
    want = {"a": 2 / 3, "b": 0.0, "c": 1 / 3, "d": 1.0}
    assert {a["content"]: a["reward"] for a in row["responses"][:-1]} == pytest.approx(want)
    assert {a["weight"] for a in row["responses"][:-1]} == {1.0}
    anchor = {"content": "T", "source": "anchor", "anchor": True, "reward": 1.0, "weight": 1.0}
    assert row["responses"][-1] == anchor
    assert "anchor" not in row
    assert len(rounds[0]) == outcome.sums["comparisons"] == (8 if compare == "anchor" else 12)
    assert {(a.max_tokens, a.top_logprobs > 1) for a in rounds[0]} == {(1, True)}
    read_back = convert(Record("w", row), SOURCE).row
    assert read_back is not None
    assert read_back.kind == "set"


@pytest.mark.parametrize("compare", ["anchor", "each_other"])
@pytest.mark.parametrize("seed", range(6))
def test_the_order_of_the_candidates_does_not_matter(compare: Any, seed: int) -> None:
    quality = {t: random.Random(seed).gauss(0, 1) + len(t) for t in QUALITY}
    rewards = []
    for order in itertools.islice(itertools.permutations("abcd"), seed, 24, 7):
        row = {**ANCHORED, "responses": list(order)}
        outcome, _ = played(pu_rl(row, compare=compare), preferring(quality, first=0.3))
        rewards.append({a["content"]: a["reward"] for a in outcome.rows[0]["responses"]})
    assert all(r == pytest.approx(rewards[0]) for r in rewards)


def test_orders_that_disagree_are_counted() -> None:
    outcome, _ = played(pu_rl(), preferring(QUALITY, first=1.2))
    # T is 2: a and d, at a distance of 1, are preferred by their place; b and c are not
    assert outcome.sums["candidates whose two orders disagree"] == 2
    outcome, _ = played(pu_rl(compare="each_other"), preferring(QUALITY, first=0.7))
    assert outcome.sums["pairs of candidates whose two orders disagree"] == 1  # a and c


def test_a_candidate_whose_comparison_says_neither_yes_nor_no_is_left_out() -> None:
    def speak(ask: Ask) -> Sequence[str] | Answer:
        mute = Answer((Reply("Well", "length", top=({"Well": -0.1},)),))
        return mute if part(ask, "first") == "c" else preferring(QUALITY)(ask)

    outcome, _ = played(pu_rl(), speak)
    found = {a["content"]: a["reward"] for a in outcome.rows[0]["responses"]}
    assert found == {"a": 0.5, "b": 0.0, "d": 1.0, "T": 1.0}
    assert outcome.sums["comparisons with neither yes nor no"] == 1
    outcome, _ = played(pu_rl(compare="each_other"), speak)
    assert outcome.dropped == "a comparison with neither yes nor no"
    outcome, _ = played(pu_rl(), lambda _: Answer((Reply("yes"),)))
    assert outcome.dropped == "fewer than two candidates that could be compared"


def test_the_anchor_comes_from_a_teacher_once_and_the_candidates_from_the_model() -> None:
    def speak(ask: Ask) -> Sequence[str] | Answer:
        if isinstance(ask, Second):
            return ["T"]
        return ["a", "b", "a", "", "T"] if ask.n == 5 else preferring(QUALITY)(ask)

    row = {"id": "s", "prompt": [{"role": "user", "content": "q"}]}
    outcome, rounds = played(pu_rl(row, anchor=None, teacher="big", sample=5, weight=0.25), speak)
    assert [(type(a), a.n) for a in rounds[0]] == [(Second, 1), (Ask, 5)]
    assert [a["source"] for a in outcome.rows[0]["responses"]] == ["m", "m", "big"]
    assert [a["weight"] for a in outcome.rows[0]["responses"]] == [1.0, 1.0, 0.25]
    assert outcome.rows[0]["responses"][0]["content"] == [{"role": "assistant", "content": "a"}]
    assert outcome.sums["candidates cut, empty or the same as another"] == 3


def test_pairs_of_anchors_and_a_weight_of_zero() -> None:
    outcome, _ = played(pu_rl(form="pair", weight=0.5), preferring(QUALITY))
    said = [(r["id"], r["chosen"], r["rejected"], r["weight"]) for r in outcome.rows]
    assert said == [("s/best-worst", "d", "b", 1.0), ("s/anchor-worst", "T", "b", 0.5)]
    outcome, _ = played(pu_rl(form="pair", weight=0), preferring(QUALITY))
    assert [r["id"] for r in outcome.rows] == ["s/best-worst"]
    tokens = [{"content": c, "token_ids": [k, 2], "logps": [-1.0, -1.0]} for k, c in enumerate("ab")]
    row = {**ANCHORED, "responses": tokens, "prompt_ids": [1]}
    outcome, _ = played(pu_rl(row, weight=0), preferring(QUALITY))
    assert [a["token_ids"] for a in outcome.rows[0]["responses"]] == [(0, 2), (1, 2)]
    outcome, _ = played(pu_rl(row), preferring(QUALITY))
    assert "prompt_ids" not in outcome.rows[0]
    outcome, _ = played(pu_rl(form="pair"), lambda _: likely(0.5))
    assert outcome.dropped == "equal scores"


def test_a_row_without_its_anchor_is_bad_and_a_pair_can_be_it() -> None:
    outcome, rounds = played(pu_rl({**ANCHORED, "anchor": ""}), preferring(QUALITY))
    assert not rounds
    assert str(outcome.problem) == "w: anchor: expected the anchor, as text, got ''"
    pair = {"id": "p", "prompt": "q", "chosen": "T", "rejected": "z"}
    outcome, _ = played(
        pu_rl(pair, anchor="chosen", sample=2),
        lambda a: ["a", "b"] if a.n == 2 else preferring(QUALITY)(a),
    )
    assert [a["content"] for a in outcome.rows[0]["responses"]] == ["a", "b", "T"]
    assert played(pu_rl(pair, anchor="chosen"), preferring(QUALITY))[0].dropped == "fewer than two candidates"


# --- steps


@pytest.mark.parametrize("seed", range(10))
def test_steps_join_to_the_text_and_none_is_blank(seed: int) -> None:
    text = "".join(random.Random(seed).choice("ab\n ") for _ in range(40)) + "x"
    for separator in ("\n", "\n\n", ". "):
        steps = split_steps(text, separator)
        assert "".join(steps) == text
        assert all(s.strip() for s in steps)


def test_the_value_is_the_chance_that_one_of_the_best_is_right() -> None:
    assert value([True, False, False, False, False], 5) == pytest.approx(1 - 0.8**5)
    assert value([True, False], 1) == 0.5
    assert value([False], 5) == 0
    assert value([True], 5) == 1


SOLUTION = "one\ntwo\nthree\nso 7"
PROBLEM = {"id": "s", "prompt": "5 + 3?", "answer": "8", "responses": [SOLUTION, "right 8"]}


def verify(prompt: Any, texts: Sequence[str], fields: Mapping[str, Any]) -> list[float | None]:
    return [None if "?!" in t else float(t.endswith(fields["answer"])) for t in texts]


def going_on(rights: Mapping[str, int]) -> Speak:
    """After each beginning so many of the samples are right."""

    def speak(ask: Ask) -> Sequence[str]:
        text = ask.messages[0]["content"]
        begun = part(ask, "beginning") if "<beginning>" in text else ""
        n = rights[begun.rstrip("\n").rpartition("\n")[2]]
        return [f"then{k} 8" if k < n else "then 9" for k in range(ask.n)]

    return speak


def steps(row: Mapping[str, Any] = PROBLEM, **options: Any) -> Dialogue:
    return Steps(SOURCE, "m", verify, **options)(Record("w", dict(row)))


def test_the_pair_parts_at_the_first_pit() -> None:
    outcome, rounds = played(steps(best_of=1), going_on({"": 3, "one": 4, "two": 0, "three": 1}))
    (row,) = outcome.rows
    assert row["contrast"]["values"] == pytest.approx([0.6, 0.8, 0.0, 0.2, 0.0])
    assert row["contrast"]["advantages"] == pytest.approx([0.2, -0.8, 0.2, -0.2])
    assert (row["id"], row["contrast"]["pit"], row["answer"]) == ("s/0-pit", 2, "8")
    assert row["responses"] == [
        {"content": "one\nthen0 8", "source": "m", "reward": 1.0},
        {"content": "one\ntwo\n", "reward": 0.0, "ended": False},
    ]
    assert [len(asks) for asks in rounds] == [4]  # the prompt, and after each step but the last
    assert {a.n for a in rounds[0]} == {5}
    assert outcome.sums["solutions sampled"] == 20
    assert convert(Record("w", row), SOURCE).row is not None


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("best_of", [1, 5])
def test_advantages_sum_to_the_outcome_less_the_value_of_the_prompt(seed: int, best_of: int) -> None:
    draw = random.Random(seed)
    rights = {name: draw.randrange(6) for name in ("", "one", "two", "three")}
    outcome, _ = played(steps(best_of=best_of), going_on(rights))
    (row,) = outcome.rows
    values = row["contrast"]["values"]
    assert sum(row["contrast"]["advantages"]) == pytest.approx(0 - values[0])
    assert values[0] == pytest.approx(1 - (1 - rights[""] / 5) ** best_of)
    assert values[row["contrast"]["pit"]] == min(values[1:])
    assert min(values[1:]) not in values[1 : row["contrast"]["pit"]]


def test_a_pit_after_which_nothing_was_right_takes_a_right_solution() -> None:
    outcome, _ = played(steps(), going_on({"": 0, "one": 0, "two": 0, "three": 0}))
    assert outcome.rows[0]["responses"][0]["content"] == "right 8"
    assert outcome.rows[0]["contrast"]["pit"] == 1
    assert outcome.sums["pairs with a right continuation"] == 0
    alone = {**PROBLEM, "responses": [SOLUTION, "other 9"]}
    outcome, _ = played(steps(alone), going_on({"": 0, "one": 1, "two": 0, "three": 0}))
    assert [r["id"] for r in outcome.rows] == ["s/0-pit"]  # from `one`; `other 9` has nothing right beside it
    assert outcome.sums["wrong solutions left: no right one to prefer"] == 1
    outcome, _ = played(steps(alone), going_on(dict.fromkeys(["", "one", "two", "three"], 0)))
    assert outcome.dropped == "no right solution, nor a right continuation"


def test_a_solution_whose_last_step_is_the_pit_stays_whole() -> None:
    outcome, _ = played(steps(), going_on({"": 5, "one": 5, "two": 4, "three": 3}))
    (row,) = outcome.rows
    assert row["contrast"]["pit"] == 4
    assert row["responses"][1] == {"content": SOLUTION, "reward": 0.0}
    assert row["responses"][0]["content"] == "one\ntwo\nthree\nthen0 8"


def test_what_cannot_be_verified_is_neither_right_nor_wrong() -> None:
    row = {**PROBLEM, "responses": ["?! 8", "a\nso 9"]}

    def speak(ask: Ask) -> Sequence[str]:
        return ["?!", "?!", "?!", "b 8", "c 9"]

    outcome, _ = played(steps(row, best_of=1), speak)
    assert outcome.rows[0]["contrast"]["values"] == [0.5, 0.5, 0.0]
    assert outcome.sums["solutions that could not be verified"] == 1 + 2 * 3
    assert played(steps(row), lambda _: ["?!"] * 5)[0].dropped == "no sampled solution could be verified"
    assert played(steps({**PROBLEM, "responses": ["8", "= 8"]}), speak)[0].dropped == "no wrong solution"


def test_a_right_solution_that_was_cut_counts_but_is_not_preferred() -> None:
    cut = Answer((Reply("8", "length"), Reply("so 8", "stop"), Reply("9", "stop"), Reply("7", "stop")))
    outcome, _ = played(steps({**PROBLEM, "responses": ["a\n9"]}, best_of=1), lambda _: cut)
    assert outcome.rows[0]["contrast"]["values"] == [0.5, 0.5, 0.0]
    assert outcome.rows[0]["responses"][0]["content"] == "a\nso 8"
    assert outcome.sums["solutions sampled that were cut"] == 2


def test_a_row_without_an_answer_is_bad() -> None:
    outcome, _ = played(steps({**PROBLEM, "answer": None}), going_on({}))
    assert str(outcome.problem) == "w: answer: expected what the verifier compares with, got nothing"


def test_plain_text_is_continued_as_it_is() -> None:
    _, rounds = played(steps(plain_text=True), lambda _: ["8"] * 5)
    said = [a.messages[0] for a in rounds[0]]
    assert {m["role"] for m in said} == {TEXT}
    assert [m["content"] for m in said] == ["5 + 3?" + b for b in ("", "one\n", "one\ntwo\n", "one\ntwo\nthree\n")]


def test_equal_beginnings_are_asked_for_once_and_per_prompt_limits_the_wrong_ones() -> None:
    row = {**PROBLEM, "responses": ["one\n7", "one\n6", "one\n5"]}
    outcome, rounds = played(steps(row, per_prompt=2), going_on({"": 1, "one": 1}))
    assert len(rounds[0]) == 2
    assert [r["id"] for r in outcome.rows] == ["s/0-pit", "s/1-pit"]
    assert outcome.sums["wrong solutions beyond --per-prompt"] == 1


# --- the script


def ran(kind: str, output: Path, rows: Sequence[Mapping[str, Any]], *argv: str) -> tuple[list[dict[str, Any]], Any]:
    """What the script writes, and its report."""
    source = write(output.with_name(f"{output.stem}-in.jsonl"), rows)
    script("contrast").main([kind, source, "-o", str(output), *argv])
    return read(output), json.loads(output.with_name(output.name + ".report.json").read_text())


def shown(body: Body, tag: str) -> str:
    return part(Ask(messages=tuple(body["messages"])), tag)


def speaking(speak: Speak) -> Callable[[Body], list[str]]:
    def answer(body: Body) -> list[str]:
        said = speak(Ask(messages=tuple(body["messages"]), n=body.get("n", 1)))
        assert not isinstance(said, Answer)
        return list(said)

    return answer


def test_the_script_searches_and_a_second_run_pays_nothing(tmp_path: Path) -> None:
    rows = [NEGATIVE, {**NEGATIVE, "id": "fine", "responses": ["good"]}, {**NEGATIVE, "id": "lost", "responses": ["z"]}]
    out = tmp_path / "o.jsonl"
    with FakeOpenAI(speaking(world({"good": 5, "r2": 4}))) as server:
        argv = ["--model", "m", "--url", server.url, "--depth", "1", "--price-out", "2"]
        made, report = ran("spar", out, rows, *argv)
        paid = len(server.bodies)
        again, second = ran("spar", out, rows, *argv, "--force")
        assert len(server.bodies) == paid
    assert [(r["id"], r["chosen"], r["rejected"]) for r in made] == [("n/0-spar", "r2", "r")]
    assert made == again
    assert report["dropped"] == {"no answer that the majority fails": 1, "no refinement passed": 1}
    assert report["sums"]["nodes"] == 6
    assert report["sums"]["verdicts"] == 5 * (4 + 6)
    assert report["sums"]["requests"] == paid == second["sums"]["requests"]
    assert report["sums"]["cost ($)"] > 0
    assert report["options"]["verdicts"] == 5
    assert {p["id"] for p in report["options"]["prompts"]} == {"spar-judge", "spar-refine"}


def test_the_script_asks_this_model_and_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY_NOW", "sk-of-the-first-server")
    earlier = judged({"a": (3, 3, 3), "b": (5, 5, 5), "c": (1, 1, 1)})
    with FakeOpenAI(speaking(judged(POINTS))) as now, FakeOpenAI(speaking(earlier)) as before:
        argv = ["--model", "m2", "--url", now.url, "--previous-model", "m1", "--previous-url", before.url]
        argv += ["--key-env", "KEY_NOW"]
        rows, report = ran("self_rewarding", tmp_path / "o.jsonl", [SET, {**SET, "id": "t"}], *argv)
        assert {b["model"] for b in now.bodies} == {"m2"}
        assert {b["model"] for b in before.bodies} == {"m1"}
        assert len(now.bodies) == len(before.bodies) == 6
        assert {h["authorization"] for h in now.headers} == {"Bearer sk-of-the-first-server"}
        assert not any("sk-of" in h["authorization"] for h in before.headers)
        constant, _ = ran("self_rewarding", tmp_path / "o.jsonl", [SET], *argv, "--consistency", "0.3333", "--force")
    assert [(r["chosen"], r["rejected"], r["consistency"]) for r in rows] == [("a", "b", pytest.approx(1 / 3))] * 2
    assert report["sums"]["mean consistency"] == 0.333333
    assert report["options"]["previous"]["model"] == "m1"
    assert sorted(p.name for p in tmp_path.glob("*.calls.jsonl")) == [
        "o.jsonl.calls.jsonl",
        "o.jsonl.previous.calls.jsonl",
    ]
    assert constant[0]["consistency"] == 0.3333
    row = convert(Record("w", constant[0]), SOURCE, Wanted(columns=("consistency",))).row
    assert row is not None
    assert row.columns == {"consistency": 0.3333}


def test_the_script_ranks_by_log_probs_without_any_model(tmp_path: Path) -> None:
    fields = ("logps", "ref", "old", "old_ref")
    numbers = {"a": (-2.0, -4.0, -3.0, -4.0), "b": (-1.0, -4.0, -3.0, -4.5), "c": (-5.0, -2.0, -9.0, -4.0)}
    answers = [{"content": c, **{k: [x] for k, x in zip(fields, xs)}} for c, xs in numbers.items()]
    argv = ["--now", "logps", "--now-less", "ref", "--before", "old", "--before-less", "old_ref"]
    rows, report = ran("self_rewarding", tmp_path / "o.jsonl", [{"prompt": "q", "responses": answers}], *argv)
    assert [(r["chosen"], r["rejected"], r["consistency"]) for r in rows] == [("b", "c", 1.0)]
    assert [rows[0]["chosen_reward"], rows[0]["rejected_reward"]] == [3.0, -3.0]
    assert "requests" not in report["sums"]
    assert not list(tmp_path.glob("*.calls.jsonl"))


def test_the_script_asks_a_teacher_for_anchors(tmp_path: Path) -> None:
    def student(body: Body) -> list[str] | dict[str, Any]:
        if "top_logprobs" not in body:
            return ["a", "b", "d"]
        ask = Ask(messages=tuple(body["messages"]))
        top = preferring(QUALITY)(ask)
        assert isinstance(top, Answer)
        assert top.replies[0].top is not None
        found = completion(body, "yes")
        likeliest = [{"token": t, "bytes": None, "logprob": p} for t, p in top.replies[0].top[0].items()]
        found["choices"][0]["logprobs"]["content"][0]["top_logprobs"] = likeliest
        return found

    with FakeOpenAI(student) as small, FakeOpenAI(lambda _: "T") as big:
        argv = ["--model", "m", "--url", small.url, "--teacher-model", "big", "--teacher-url", big.url]
        rows, report = ran("pu_rl", tmp_path / "o.jsonl", [{"id": "s", "prompt": "q"}], *argv, "--candidates", "3")
        assert len(big.bodies) == 1
    answers = rows[0]["responses"]
    assert [(a["content"], a["reward"]) for a in answers] == [("a", 0.5), ("b", 0.0), ("d", 1.0), ("T", 1.0)]
    assert report["sums"]["comparisons"] == 6
    assert report["options"]["teacher"]["model"] == "big"
    assert "anchor" not in rows[0]


def test_the_script_verifies_steps(tmp_path: Path) -> None:
    row = {**PROBLEM, "responses": ["5 + 3\nis 7", "5 + 3\nis 8"]}
    with FakeOpenAI(lambda body: ["is 8", "is 7", "is 9", "is 8.", "?"] * 2) as server:
        argv = ["--verifier", "exact", "--pattern", r"\d+", "--best-of", "1", "--samples", "10"]
        rows, report = ran("steps", tmp_path / "o.jsonl", [row], "--model", "m", "--url", server.url, *argv)
    assert rows[0]["contrast"]["values"] == [0.4, 0.4, 0.0]
    assert rows[0]["contrast"]["pit"] == 2
    assert [a["content"] for a in rows[0]["responses"]] == ["5 + 3\nis 8", "5 + 3\nis 7"]
    assert report["sums"]["solutions sampled"] == 20
    assert report["options"]["verifier_options"] == {"column": "answer", "pattern": r"\d+"}


@pytest.mark.parametrize(
    ("kind", "argv", "said"),
    [
        ("spar", ["--model", "m", "--gate", "0.2"], "--gate: expected 0.5 or more, and less than 1, got 0.2"),
        ("spar", ["--model", "m", "--prompt-file", "judge=x"], "--prompt-file: expected ID=FILE"),
        ("self_rewarding", [], "expected --model, which judges, or --now"),
        ("self_rewarding", ["--model", "m", "--now", "reward"], "and not both"),
        ("self_rewarding", ["--model", "m", "--now-less", "x"], "--now-less: goes with --now"),
        ("self_rewarding", ["--now", "x", "--before", "y", "--previous-model", "m"], "expected one of them"),
        ("self_rewarding", ["--now", "x", "--consistency", "7"], "--consistency: expected 0 to 1, got 7"),
        ("pu_rl", ["--model", "m", "--anchor-weight", "-1"], "--anchor-weight: expected 0 or more, got -1"),
        ("pu_rl", ["--model", "m", "--candidates", "1"], "--candidates: expected two or more"),
        ("steps", ["--model", "m", "--verifier", "math", "--pattern", "x"], "--pattern: goes with --verifier exact"),
    ],
)
def test_the_script_refuses_what_does_not_go_together(tmp_path: Path, kind: str, argv: list[str], said: str) -> None:
    with pytest.raises(UserError) as e:
        script("contrast").main([kind, write(tmp_path / "i.jsonl", []), "-o", str(tmp_path / "o.jsonl"), *argv])
    assert said in str(e.value)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "head"), [("self_rewarding", "cream"), ("steps", "dpo"), ("pu_rl", "infonca")])
def test_the_rows_train_the_head_that_they_are_for(tmp_path: Path, kind: str, head: str) -> None:
    answers = [{"content": f"w{k} w7\nw8 w9", "now": k, "old": -k * (k - 1)} for k in (1, 2, 3)]
    given = [{"id": f"p{i}", "prompt": f"w{i} ", "responses": answers, "anchor": "w20 w21"} for i in range(4)]

    def speak(body: Body) -> list[str] | dict[str, Any]:
        if "top_logprobs" not in body:
            return ["w9 w20", "w9"]
        found = completion(body, "yes")
        p = 0.1 * len(set(shown(body, "first")) & set(shown(body, "second"))) + 0.01 * len(shown(body, "first"))
        p += 0.1 * ("w2" in shown(body, "first"))
        top = [{"token": t, "bytes": None, "logprob": math.log(x)} for t, x in (("yes", p), ("no", 1.5))]
        found["choices"][0]["logprobs"]["content"][0]["top_logprobs"] = top
        return found

    rows = [{**row, "answer": "w20"} for row in given]
    with FakeOpenAI(speak) as server:
        model = ["--model", "m", "--url", server.url]
        argv = {
            "self_rewarding": ["--now", "now", "--before", "old"],
            "steps": [*model, "--verifier", "exact", "--pattern", r"w\d+", "--samples", "2"],
            "pu_rl": model,
        }[kind]
        made, _ = ran(kind, tmp_path / "o.jsonl", rows, *argv)
    assert made
    net = make_model(tmp_path / "model")
    reference = {"from": "init", "kind": "adapter_off"}
    changes = {"loss": [{"head": head}], "reference": reference, "train": {"per_device_train_batch_size": 2}}
    train(*load(write_recipe(tmp_path / "r.yaml", net, tmp_path / "o.jsonl", tmp_path / "run", **changes)))
    steps = [line for line in logs(tmp_path / "run") if "grad_norm" in line]
    assert steps
    assert all(line["grad_norm"] > 0 for line in steps)


def test_what_was_answered_before_the_work_broke_off_is_not_asked_again(tmp_path: Path) -> None:
    passing = speaking(world({"good": 5, "r00": 5}))
    argv = ["--model", "m", "--keep", "1"]  # so that r0 is refined alone
    out = tmp_path / "o.jsonl"

    def locked(body: Body) -> list[str] | int:
        return 401 if "<found>" in body["messages"][0]["content"] and shown(body, "answer") == "r0" else passing(body)

    with FakeOpenAI(locked) as server, pytest.raises(UserError, match="401"):
        ran("spar", out, [NEGATIVE], *argv, "--url", server.url)
    first = [json.dumps(b) for b in server.bodies]
    with FakeOpenAI(passing) as server:
        rows, _ = ran("spar", out, [NEGATIVE], *argv, "--url", server.url)
    second = [json.dumps(b) for b in server.bodies]
    assert rows[0]["chosen"] == "r00"
    (refused,) = set(first) & set(second)
    assert shown(json.loads(refused), "answer") == "r0"
    assert len(first) + len(second) - 1 == len({*first, *second})


def test_answers_of_more_than_text_are_no_roots_and_lone_ones_are() -> None:
    call = {"role": "assistant", "content": "r", "tool_calls": [{"type": "function", "function": {"name": "f"}}]}
    row = {"prompt": [{"role": "user", "content": "q"}], "responses": [[call], [{"role": "assistant", "content": "r"}]]}
    outcome, _ = played(spar(row), world({"r1": 5}))
    assert [r["id"] for r in outcome.rows] == ["w/1-spar"]
    for lone in ({"prompt": "q", "completion": "r"}, {"prompt": "q", "responses": ["r"], "label": [False]}):
        outcome, _ = played(spar(lone), world({"r1": 5}))
        assert (outcome.rows[0]["chosen"], outcome.rows[0]["rejected"]) == ("r1", "r")
    outcome, _ = played(spar({"prompt": "q"}), world({}))
    assert outcome.dropped == "no answer that is one text"
    lone = {"prompt": "5 + 3?", "answer": "8", "completion": "a\n9"}
    outcome, _ = played(steps(lone), lambda _: ["8", "9"])
    assert outcome.rows[0]["responses"][1]["content"] == "a\n9"
