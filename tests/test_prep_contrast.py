"""Pairs made for contrast: every strategy by answers sent by hand, then the script against a server."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from fake_openai import FakeOpenAI, completion
from prep_support import ROOT, ran, script, write
from test_trainer import logs
from tiny import make_model, write_recipe

from po.data.formats import convert
from po.data.read import Record
from po.errors import UserError
from po.heads import HEADS
from po.prep.chat import Answer, Ask, Dialogue, Reply
from po.prep.contrast_prompts import BMC, CLAIR, NAT_PARTLY, NAT_RIGHT, NAT_WRONG, POPALIGN, PREFIX_BAD, REFINE
from po.prep.distance import edited, jaccard, levenshtein
from po.prep.nat import Tell, told
from po.prep.popalign import PopAlign
from po.prep.prompts import Prompt, replaced
from po.prep.revise import Revise
from po.prep.second import Second
from po.prep.step import Outcome
from po.recipe import load
from po.run import train
from po.spec import Source

SOURCE = Source("in.jsonl")
ASKED = [{"role": "user", "content": "Who wrote Hamlet, and when?"}]
OLD = "Hamlet was written by Marlowe, around the year 1600, in London."
NEW = "Hamlet was written by Shakespeare, around the year 1600, in London."
SET = {
    "id": "q",
    "prompt": "Who wrote Hamlet?",
    "topic": "plays",
    "responses": [
        {"content": "Shakespeare wrote it, in or around the year 1600, in London.", "reward": 9.0, "source": "a"},
        {"content": OLD, "reward": 2.0, "source": "b"},
        {"content": "No idea at all.", "reward": 3.0, "source": "c"},
    ],
}
PAIR = {"id": "p", "prompt": ASKED, "chosen": "Shakespeare did.", "rejected": OLD}
Sent = str | Reply | Answer


def answer(said: Sent) -> Answer:
    if isinstance(said, Answer):
        return said
    return Answer((Reply(said, "stop") if isinstance(said, str) else said,))


def sent(dialogue: Dialogue, *rounds: Sequence[Sent]) -> tuple[list[list[Ask]], Outcome]:
    """What a row asks, round by round, and its outcome."""
    asked: list[list[Ask]] = []
    try:
        asked.append(next(dialogue))
        for said in rounds:
            assert len(said) == len(asked[-1])
            asked.append(dialogue.send([answer(s) for s in said]))
    except StopIteration as end:
        return asked, end.value
    raise AssertionError("asks for more")


def clair(row: dict[str, Any], *said: Sent, **more: Any) -> tuple[list[list[Ask]], Outcome]:
    work = Revise(SOURCE, more.pop("kind", "clair"), more.pop("prompt", CLAIR), "teacher", **more)
    return sent(work(Record("in.jsonl:1", row)), said)


def bmc(row: dict[str, Any], *said: Sent, **more: Any) -> tuple[list[list[Ask]], Outcome]:
    return clair(row, *said, kind="bmc", prompt=BMC, **more)


def revised(text: str) -> str:
    return f"[[NOTES]]\nThe author is wrong.\n\n[[REVISED]]\n{text}"


def loads_as_pair(row: dict[str, Any]) -> Any:
    found = convert(Record("w", json.loads(json.dumps(row))), SOURCE)
    assert found.row is not None, found.problems
    assert found.row.is_pair
    assert [r.reward for r in found.row.responses] == [None, None]
    return found.row


def test_distances_are_what_brute_force_says() -> None:
    def slow(a: str, b: str) -> int:
        row = list(range(len(b) + 1))
        for i, x in enumerate(a, 1):
            new = [i]
            for j, y in enumerate(b, 1):
                new.append(min(row[j] + 1, new[-1] + 1, row[j - 1] + (x != y)))
            row = new
        return row[-1]

    draw = random.Random(0)
    for _ in range(500):
        a, b = ("".join(draw.choices("abc", k=draw.randrange(9))) for _ in range(2))
        assert levenshtein(a, b) == levenshtein(b, a) == slow(a, b), (a, b)
    assert levenshtein("kitten", "sitting") == 3
    assert edited("kitten", "sitting") == 3 / 7
    assert edited("", "") == 0
    assert jaccard("A cat, a dog.", "a CAT!") == 2 / 6  # a cat, and of , dog . ! none
    assert jaccard("", " ") == 1


def test_clair_revises_the_worst_answer_of_a_set() -> None:
    (asks, *_), outcome = clair(SET, revised(NEW))
    (ask,) = asks
    content = ask.messages[0]["content"]
    assert "\nWho wrote Hamlet?\n" in content
    assert f"\n{OLD}\n" in content
    assert (ask.n, ask.temperature, len(ask.messages)) == (1, 0.7, 1)
    (row,) = outcome.rows
    how = row.pop("contrast")
    assert row == {
        "id": "q/clair", "prompt": SET["prompt"], "topic": "plays",
        "chosen": NEW, "chosen_source": "teacher", "rejected": OLD, "rejected_source": "b",
    }  # fmt: skip
    assert how.pop("jaccard") == round(jaccard(OLD, NEW), 6) > 0.8
    assert how.pop("levenshtein") == round(edited(OLD, NEW), 6) < 0.2
    assert how == {"strategy": "clair", "prompts": [CLAIR.said], "rejected_reward": 2.0}
    assert CLAIR.said.keys() == {"id", "version", "sha256"}
    assert outcome.sums == {"mean jaccard": round(jaccard(OLD, NEW), 6), "mean levenshtein": round(edited(OLD, NEW), 6)}
    loads_as_pair(outcome.rows[0])


def test_clair_revises_the_rejected_of_a_pair_and_keeps_what_it_says() -> None:
    given = {**PAIR, "chosen_rating": 5, "rejected_reward": 1.0, "chosen_reward": 7.0, "margin": 2.0, "lang": "en"}
    _, outcome = clair(given, revised(NEW))
    (row,) = outcome.rows
    assert list(row["prompt"]) == ASKED == list(loads_as_pair(row).prompt)
    assert row["chosen"] == [{"role": "assistant", "content": NEW}]
    assert [m["content"] for m in row["rejected"]] == [OLD]
    assert row["lang"] == "en"
    assert {"chosen_rating", "margin", "chosen_reward", "rejected_reward"}.isdisjoint(row)
    assert row["original"]["chosen_rating"] == 5
    assert {k: row["original"][k] for k in ("margin", "chosen_reward", "rejected_reward")} == {
        "margin": 2.0, "chosen_reward": 7.0, "rejected_reward": 1.0
    }  # fmt: skip
    assert [m["content"] for m in row["original"]["chosen"]] == ["Shakespeare did."]
    assert "rejected" not in row["original"]


def test_clair_revises_a_lone_answer_and_shows_the_whole_conversation() -> None:
    talk = [{"role": "system", "content": "Be brief."}, *ASKED]
    (asks, *_), outcome = clair({"prompt": talk, "completion": OLD}, revised(NEW))
    assert "System: Be brief.\n\nUser: Who wrote Hamlet" in asks[0].messages[0]["content"]
    assert outcome.rows[0]["id"] == "in.jsonl:1/clair"


def test_a_plain_answer_keeps_the_white_space_around_it() -> None:
    row = {"prompt": "Q: Who wrote Hamlet?\nA:", "chosen": " Shakespeare", "rejected": f" {OLD}\n"}
    _, outcome = clair(row, revised(NEW))
    assert outcome.rows[0]["chosen"] == f" {NEW}\n"


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (NEW, "no marker in the reply"),
        ("", "an empty reply"),
        (revised("  \n "), "nothing behind the marker"),
        (revised(f"{NEW}\n[[REVISED]]\n{NEW}"), "a marker left in the text"),
        (revised(f"{NEW}\n[[NOTES]]\nfine now"), "a marker left in the text"),
        (Reply(revised(NEW), "length"), "a reply cut at --max-tokens"),
        (revised(f" {OLD.upper()} "), "the revision is the answer"),
        (revised("Not one word in common here!"), "a new answer, no revision"),
        (revised(f"Here is the corrected answer: {NEW}"), "speaks of a revision"),
        (revised(f"The learner meant this. {NEW}"), "speaks of a revision"),
        (revised(f"I've revised it. {NEW}"), "speaks of a revision"),
        (revised(f"{NEW} This revision names the author."), "speaks of a revision"),
        (Answer(problem="HTTP 500: failed"), "no answer: HTTP 500: failed"),
    ],
)
def test_a_reply_that_will_not_do_drops_the_row(said: Sent, reason: str) -> None:
    _, outcome = clair(PAIR, said)
    assert (outcome.rows, outcome.dropped, outcome.problem) == ((), reason, None)
    assert not any(name.startswith("mean") for name in outcome.sums)


def test_a_reasoning_models_thought_may_speak_of_the_marker() -> None:
    _, outcome = clair(PAIR, f"<think>I must write [[NOTES]] and [[REVISED]] here.</think>\n{revised(NEW)}")
    assert outcome.rows[0]["chosen"][0]["content"] == NEW


@pytest.mark.parametrize("marker", ["**[[REVISED]]**", "### [[REVISED]]:", "`[[REVISED]]`", "**[[REVISED]]:**"])
def test_a_marker_may_be_emphasised(marker: str) -> None:
    _, outcome = clair(PAIR, f"[[NOTES]] hm\n{marker}\n\n{NEW}\n")
    assert outcome.rows[0]["chosen"][0]["content"] == NEW


def test_words_of_the_task_itself_do_not_speak_of_a_revision() -> None:
    for task, text in (
        ("Tell the learner who wrote Hamlet.", f"The learner should know: {NEW}"),
        ("Write a corrected version of the note.", f"The corrected version: {NEW}"),
        ("Who wrote Hamlet?", f"To answer a question that the students have: {NEW}"),
    ):
        assert clair({**SET, "prompt": task}, revised(text))[1].rows
    _, outcome = clair(SET, revised("Hamlet was written."), least_jaccard=0.5)
    assert outcome.dropped == "a new answer, no revision"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "x", "responses": [{"content": "a", "label": None}, {"content": "b", "label": None}]}, "no reward"),
        (
            {"prompt": ASKED, "completion": [
                {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
                {"role": "tool", "content": "4"}, {"role": "assistant", "content": "4"}]},
            "an answer of more than text",
        ),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_revised_is_dropped_before_it_costs(row: dict[str, Any], reason: str) -> None:
    asked, outcome = sent(Revise(SOURCE, "clair", CLAIR, "m")(Record("w", row)))
    assert asked == []
    assert str(outcome.dropped).startswith(reason)


def test_a_bad_row_is_bad() -> None:
    for work in (Revise(SOURCE, "clair", CLAIR, "m"), PopAlign(SOURCE, ["prefix"])):
        asked, outcome = sent(work(Record("in.jsonl:7", {"chosen": 4, "rejected": "x"})))
        assert asked == []
        assert outcome.problem


def test_bmc_edits_the_worse_answer_towards_the_better() -> None:
    (asks, *_), outcome = bmc(PAIR, f"[[EDITED]]\n{NEW}")
    content = asks[0].messages[0]["content"]
    assert content.index("Shakespeare did.") < content.index(OLD)
    (row,) = outcome.rows
    assert row["id"] == "p/bmc"
    how = row["contrast"]
    assert how["levenshtein"] == round(edited(OLD, NEW), 6)
    assert how["levenshtein_to_better"] == round(edited("Shakespeare did.", NEW), 6) > how["levenshtein"]
    assert [m["content"] for m in row["original"]["chosen"]] == ["Shakespeare did."]
    loads_as_pair(row)
    (asks, *_), outcome = bmc(SET, f"[[EDITED]]\n{NEW}")
    assert outcome.rows[0]["rejected"] == OLD
    assert outcome.rows[0]["contrast"]["rejected_reward"] == 2.0
    assert SET["responses"][0]["content"] in asks[0].messages[0]["content"]  # type: ignore[index]


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (f"[[EDITED]] {OLD}", "the revision is the answer"),
        ("[[EDITED]] Shakespeare  did.", "the revision is the better answer"),
        (f"[[EDITED]] {NEW} As in answer A.", "speaks of a revision"),
        (NEW, "no marker in the reply"),
    ],
)
def test_bmc_drops_an_edit_that_is_none(said: str, reason: str) -> None:
    assert bmc(PAIR, said)[1].dropped == reason


def test_bmc_needs_a_better_and_a_worse_answer() -> None:
    row = {"prompt": "x", "responses": [{"content": "a", "reward": 1}, {"content": "b", "reward": 1}]}
    assert sent(Revise(SOURCE, "bmc", BMC, "m")(Record("w", row)))[1].dropped == "equal rewards"


ONLY = {"id": "r", "prompt": [{"role": "system", "content": "Be kind."}, *ASKED], "answer": "Shakespeare"}


def pop(row: dict[str, Any], *rounds: Sequence[Sent], **more: Any) -> tuple[list[list[Ask]], Outcome]:
    work = PopAlign(SOURCE, more.pop("strategies"), ("strong", "weak"), **more)
    return sent(work(Record("in.jsonl:1", row)), *rounds)


@pytest.mark.parametrize("strategy", ["prefix", "demon"])
def test_a_text_before_the_prompt_asks_for_good_and_for_bad_and_goes_again(strategy: str) -> None:
    texts = {p.id: p.text for p in POPALIGN}
    (asks, *_), outcome = pop(ONLY, ["A fine reply.", "meh"], strategies=[strategy])
    for ask, side in zip(asks, ("good", "bad")):
        system, *rest = ask.messages
        assert system["content"] == f"{texts[f'{strategy}-{side}']}\n\nBe kind."
        assert rest == ASKED
    assert asks[0].seed != asks[1].seed
    (row,) = outcome.rows
    assert row["id"] == f"r/{strategy}"
    assert row["prompt"] == tuple(ONLY["prompt"])
    assert [row["chosen"][0]["content"], row["rejected"][0]["content"]] == ["A fine reply.", "meh"]
    assert row["chosen_source"] == row["rejected_source"] == "strong"
    assert row["answer"] == "Shakespeare"
    assert [p["id"] for p in row["contrast"]["prompts"]] == [f"{strategy}-good", f"{strategy}-bad"]
    assert outcome.sums == {f"pairs: {strategy}": 1}
    loads_as_pair(row)


def test_without_a_system_message_the_text_becomes_one() -> None:
    (asks, *_), outcome = pop({"prompt": "Who?"}, ["A.", "B."], strategies=["prefix"])
    assert [[m["role"] for m in a.messages] for a in asks] == [["system", "user"]] * 2
    assert (outcome.rows[0]["chosen"], outcome.rows[0]["rejected"]) == ("A.", "B.")


def test_elicitive_keeps_the_reply_without_the_thought() -> None:
    good, bad = "[[THOUGHT]] be exact\n[[REPLY]]\nExact.", "[[THOUGHT]]\nbe vague\n**[[REPLY]]**\nVague."
    _, outcome = pop(ONLY, [good, bad], strategies=["elicitive"])
    assert [outcome.rows[0][side][0]["content"] for side in ("chosen", "rejected")] == ["Exact.", "Vague."]
    assert pop(ONLY, [good, "Vague."], strategies=["elicitive"])[1].dropped == "no marker in the reply"


def test_refine_prefers_the_second_turn() -> None:
    (first, second, *_), outcome = pop(ONLY, ["Draft."], ["[[BETTER]]\nFinal."], strategies=["refine"])
    assert list(first[0].messages) == ONLY["prompt"]
    assert [m["content"] for m in second[0].messages[2:]] == ["Draft.", REFINE.text]
    assert [m["role"] for m in second[0].messages[2:]] == ["assistant", "user"]
    assert [outcome.rows[0][side][0]["content"] for side in ("chosen", "rejected")] == ["Final.", "Draft."]
    asked, outcome = pop(ONLY, [Reply("Draft", "length")], strategies=["refine"])
    assert len(asked) == 1, "a cut draft is not asked about"
    assert outcome.dropped == "a reply cut at --max-tokens"


@pytest.mark.parametrize("strategy", ["nparam", "leaderboard"])
def test_a_stronger_model_is_preferred(strategy: str) -> None:
    (asks, *_), outcome = pop(ONLY, ["Strong.", "Weak."], strategies=[strategy])
    assert [type(a) for a in asks] == [Ask, Second]
    assert asks[0].messages == asks[1].messages
    row = outcome.rows[0]
    assert [row["chosen_source"], row["rejected_source"]] == ["strong", "weak"]
    assert row["contrast"] == {"strategy": strategy, "prompts": []}


def test_given_answers_are_not_asked_for() -> None:
    asked, outcome = pop(SET, strategies=["leaderboard"], given={"leaderboard": ("a", "c")})
    assert asked == []
    row = outcome.rows[0]
    assert [row["chosen_source"], row["rejected"]] == ["a", "No idea at all."]
    asked, outcome = pop(SET, strategies=["nparam"], given={"nparam": ("a", "z")})
    assert outcome.dropped == "no answer by z"


def test_all_six_at_once_ask_for_the_plain_answer_once_and_count_what_fails() -> None:
    everything = ["prefix", "demon", "elicitive", "nparam", "leaderboard", "refine"]
    said = ["G.", "B.", "Same", " same ", "[[REPLY]] G2.", Reply("x", "length"), "Plain.", "Weaker."]
    (asks, *_), outcome = pop(SET, said, ["[[BETTER]] Best."], strategies=everything, given={"leaderboard": ("a", "b")})
    assert len(asks) == 8
    assert [r["id"] for r in outcome.rows] == ["q/prefix", "q/nparam", "q/leaderboard", "q/refine"]
    assert outcome.sums == {
        "pairs: prefix": 1, "demon: the same answer twice": 1, "elicitive: a reply cut at --max-tokens": 1,
        "pairs: nparam": 1, "pairs: leaderboard": 1, "pairs: refine": 1,
    }  # fmt: skip
    for row in outcome.rows:
        assert row["topic"] == "plays"
        assert "responses" not in row
        loads_as_pair(row)


def test_rows_of_no_use_have_a_reason() -> None:
    leak = f"Certainly. {PREFIX_BAD.text}"
    assert pop(ONLY, ["Good.", leak], strategies=["prefix"])[1].dropped == "repeats its instruction"
    failed = Answer(problem="no answer within 5 s")
    assert pop(ONLY, ["Good.", failed], strategies=["prefix"])[1].dropped == "no answer: no answer within 5 s"
    _, outcome = pop(ONLY, ["a", "A", "", "x"], strategies=["prefix", "demon"])
    assert outcome.dropped == "no strategy gave a pair"
    assert outcome.sums == {"prefix: the same answer twice": 1, "demon: an empty reply": 1}


def test_a_pair_gives_its_prompt() -> None:
    _, outcome = pop(PAIR, ["Good.", "Bad."], strategies=["prefix"])
    (row,) = outcome.rows
    assert [row["original"][side][0]["content"] for side in ("chosen", "rejected")] == ["Shakespeare did.", OLD]
    assert row["chosen"][0]["content"] == "Good."


def tell(row: dict[str, Any], prompts: Sequence[Prompt] = (NAT_WRONG, NAT_RIGHT), **more: Any) -> Outcome:
    return Tell(SOURCE, prompts, **more)(Record("in.jsonl:1", row))


def test_nat_tells_right_from_wrong_by_label() -> None:
    rows = [r for label in (True, False) for r in tell({"prompt": ASKED, "completion": "x", "label": label}).rows]
    assert [r["prompt"][0]["content"] for r in rows] == [
        f"{ASKED[0]['content']}\n{p.text}" for p in (NAT_RIGHT, NAT_WRONG)
    ]
    assert [r["label"] for r in rows] == [True, False]
    assert rows[0]["contrast"] == {"strategy": "nat", "prompts": [NAT_RIGHT.said]}
    for row in rows:
        found = convert(Record("w", json.loads(json.dumps(row))), SOURCE)
        assert found.row is not None
        assert found.row.kind == "unpaired"


def test_nat_tells_classes_by_reward_a_row_per_answer() -> None:
    three = (NAT_WRONG, NAT_PARTLY, NAT_RIGHT)
    rows = tell(SET, three, thresholds=(2.0, 3.0), place="start").rows
    assert [(r["id"], r["label"], r["source"]) for r in rows] == [
        ("q/0", True, "a"), ("q/1", False, "b"), ("q/2", False, "c")
    ]  # fmt: skip
    assert [r["prompt"].partition("\n")[0] for r in rows] == [NAT_RIGHT.text, NAT_WRONG.text, NAT_PARTLY.text]
    assert [r["reward"] for r in rows] == [9.0, 2.0, 3.0]
    assert tell(SET, thresholds=(2.0,)).sums == {"answers: nat-right": 2, "answers: nat-wrong": 1}
    assert tell(SET).dropped == "no label (rewards need --thresholds)"
    assert tell(PAIR, thresholds=(1.0,)).dropped == "no reward, which --thresholds need"


def test_nat_takes_pairs_apart_and_leaves_out_what_has_no_label() -> None:
    rows = tell({**PAIR, "margin": 1.5}).rows
    assert [(r["id"], r["label"], r["original"]) for r in rows] == [
        ("p/0", True, {"margin": 1.5}), ("p/1", False, {"margin": 1.5})
    ]  # fmt: skip
    some = {"prompt": "x", "responses": [{"content": "a", "label": None}, {"content": "b", "label": True}]}
    assert [r["id"] for r in tell(some).rows] == ["in.jsonl:1/1"]
    assert tell(some).sums["answers without a label"] == 1
    none = {"prompt": "x", "responses": [{"content": "a", "label": None}]}
    assert tell(none).dropped == "no label on any answer"


def test_nat_puts_its_text_into_what_the_user_said_last() -> None:
    assert told("Q: 2+2?\n", "T", "end") == "Q: 2+2?\nT\n"
    assert told("Q: 2+2?", "T", "start") == "T\nQ: 2+2?"
    assert told("\n\nHuman: 2+2?\n\nAssistant:", "T", "end") == "\n\nHuman: 2+2?\nT\n\nAssistant:"
    turns = ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("tool", "e")
    talk = tuple({"role": role, "content": content} for role, content in turns)
    assert [m["content"] for m in told(talk, "T", "end")] == ["a", "b", "c\nT", "d", "e"]  # type: ignore[index]
    system = {"prompt": [{"role": "system", "content": "x"}], "completion": "y", "label": True}
    assert tell(system).dropped == "no user's message to say it in"


def test_nat_tells_prompts_alone_the_best_class() -> None:
    (row,) = tell({"prompt": "2+2?", "answer": "4", "completion": "5"}, inference=True).rows
    assert row["prompt"] == f"2+2?\n{NAT_RIGHT.text}"
    assert row["answer"] == "4"
    assert "completion" not in row


def test_a_prompt_is_filled_once() -> None:
    prompt = Prompt("p", 1, "{a} and {b}")
    assert prompt.fill(a="{b}", b="{a}") == "{b} and {a}"
    assert prompt.sha256 != Prompt("p", 1, "{a} and {b}.").sha256


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{task} [[REVISED]]", "expected {answer}"),
        ("{task} {answer}", "the marker [[REVISED]]"),
        ("{task} {answer} {why} [[REVISED]]", "{why}: nothing is put in there"),
        (" ", "an empty file"),
    ],
)
def test_a_prompt_from_a_file_must_ask_for_the_same(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "mine.txt").write_text(text)
    with pytest.raises(UserError) as error:
        replaced([CLAIR], [f"clair={tmp_path / 'mine.txt'}"])
    assert said in str(error.value)
    for wrong in ("clare=x", "clair"):
        with pytest.raises(UserError, match="expected ID=FILE"):
            replaced([CLAIR], [wrong])


def test_the_rows_switches_of_the_template_go_along() -> None:
    switched = {**ONLY, "chat_template_kwargs": {"enable_thinking": False}}
    (first, second, *_), outcome = pop(switched, ["G", "B", "P"], ["[[BETTER]] R"], strategies=["prefix", "refine"])
    assert {a.template_kwargs["enable_thinking"] for a in (*first, *second)} == {False}
    assert outcome.rows[1]["chat_template_kwargs"] == {"enable_thinking": False}


def teacher(body: dict[str, Any]) -> Any:
    """Revises what it is shown, well or badly, by the number in it."""
    old = body["messages"][0]["content"].partition("<answer>\n")[2].partition("\n</answer>")[0]
    n, said = int(old.split()[-1]), revised(old.replace("wrong", "right"))
    if n == 3:
        return 500
    if n == 4:
        return "I would rather not."
    if n == 5:
        cut = completion(body, said)
        cut["choices"][0]["finish_reason"] = "length"
        return cut
    return said


def rows(n: int) -> list[dict[str, Any]]:
    text = "This is a wrong answer of number"
    return [{"id": f"r{i}", "prompt": ASKED, "chosen": "Fine.", "rejected": f"{text} {i}"} for i in range(n)]


def test_the_script_asks_a_server_and_accounts_for_every_row(tmp_path: Path) -> None:
    with FakeOpenAI(teacher) as server:
        asked = ["clair", "--", "--url", server.url, "--model", "m", "--retries", "0", "--price-out", "1000000"]
        made, report = ran("contrast", *asked, output=tmp_path / "o.jsonl", rows=rows(8))
        again, _ = ran("contrast", *asked, output=tmp_path / "o.jsonl", rows=rows(8))
    assert [r["id"] for r in made] == [f"r{i}/clair" for i in (0, 1, 2, 6, 7)]
    assert made[0]["chosen"][0]["content"] == "This is a right answer of number 0"
    assert report["dropped"] == {
        "no answer: HTTP 500: failed as asked: 500": 1, "no marker in the reply": 1, "a reply cut at --max-tokens": 1
    }  # fmt: skip
    sums = report["sums"]
    assert sums["requests"] == 8
    assert sums["cost ($)"] == sums["completion tokens"] > 0
    assert sums["mean jaccard"] == made[0]["contrast"]["jaccard"] == round(7 / 9, 6)
    assert sums["mean levenshtein"] == pytest.approx(sum(r["contrast"]["levenshtein"] for r in made) / 5, abs=1e-6)
    assert report["options"]["prompts"] == [CLAIR.said]
    assert report["options"]["model"] == "m"
    assert again == made
    assert len(server.bodies) == 9, "with --force only the request that failed is made again"


def test_the_script_says_what_it_would_do_and_writes_nothing(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", rows(3))
    with FakeOpenAI(teacher) as server:
        args = ["--url", server.url, "--model", "m", "--dry-run", "--limit", "2"]
        script("contrast").main(["clair", source, "-o", str(tmp_path / "o.jsonl"), *args])
        assert len(server.bodies) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_file_takes_the_place_of_a_prompt(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("Mend this, write [[REVISED]] first.\n{task}\n<answer>\n{answer}\n</answer>\n")
    with FakeOpenAI(teacher) as server:
        args = ["--url", server.url, "--model", "m", "--prompt-file", f"clair={tmp_path / 'mine.txt'}"]
        made, report = ran("contrast", "clair", "--", *args, output=tmp_path / "o.jsonl", rows=rows(1))
        assert server.bodies[0]["messages"][0]["content"].startswith("Mend this")
    said = made[0]["contrast"]["prompts"]
    assert said == report["options"]["prompts"]
    assert said[0]["version"] == "file"
    assert said[0]["sha256"] != CLAIR.sha256


def test_two_servers_make_the_six_strategies_pairs(tmp_path: Path) -> None:
    def strong(body: dict[str, Any]) -> str:
        words = body["messages"][0]["content"]
        if body["messages"][-1]["content"] == REFINE.text:
            return "[[BETTER]] refined"
        return f"[[REPLY]] {len(words)}" if "[[REPLY]]" in words else f"strong {len(words)}"

    with FakeOpenAI(strong) as good, FakeOpenAI(lambda body: "weak") as bad:
        args = ["--url", good.url, "--model", "big", "--weak-url", bad.url, "--weak-model", "small"]
        args += ["--given", "leaderboard", "a", "b"]
        args += ["--strategies", "prefix", "demon", "elicitive", "nparam", "leaderboard", "refine"]
        made, report = ran("contrast", "popalign", "--", *args, output=tmp_path / "o.jsonl", rows=[SET, ONLY])
        assert (len(good.bodies), len(bad.bodies)) == (16, 2)
        assert {b["model"] for b in bad.bodies} == {"small"}
    names = ["prefix", "demon", "elicitive", "nparam", "leaderboard", "refine"]
    assert [r["id"] for r in made] == [f"q/{n}" for n in names] + [f"r/{n}" for n in names if n != "leaderboard"]
    assert report["sums"]["leaderboard: no answer by a"] == 1
    assert report["sums"]["requests"] == 18
    assert report["options"]["weak"]["model"] == "small"
    for row in made:
        loads_as_pair(row)


def test_given_pairs_need_no_model(tmp_path: Path) -> None:
    args = ["--strategies", "nparam", "--given", "nparam", "a", "c"]
    made, _ = ran("contrast", "popalign", "--", *args, output=tmp_path / "o.jsonl", rows=[SET])
    assert [r["id"] for r in made] == ["q/nparam"]
    with pytest.raises(UserError, match="--model"):
        ran("contrast", "popalign", "--", output=tmp_path / "o.jsonl", rows=[SET])


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--strategies", "nparam"], "--weak-model"),
        (["--weak-model", "x"], "--weak-model"),
        (["--strategies", "nparam", "leaderboard", "--weak-model", "x"], "the same pairs"),
        (["--given", "prefix", "a", "b"], "--given"),
        (["--strategies", "nparam", "--given", "nparam", "a", "b"], "--model"),
        (["--given", "nparam", "a", "b"], "--given"),
    ],
)
def test_strategies_that_cannot_be_are_refused(tmp_path: Path, args: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        ran("contrast", "popalign", "--", "--url", "http://x/v1", "--model", "m", *args, output=tmp_path / "o", rows=[])


def test_the_script_tells_nat_in_processes_and_into_parquet(tmp_path: Path) -> None:
    labelled = [{"id": f"t{i}", "prompt": ASKED, "completion": f"try {i}", "label": i % 2 == 0} for i in range(6)]
    made, report = ran("contrast", "nat", "--", "--num-proc", "2", output=tmp_path / "o.jsonl", rows=labelled)
    assert [r["label"] for r in made] == [True, False] * 3
    assert report["options"]["prompts"] == [NAT_WRONG.said, NAT_RIGHT.said]
    source = write(tmp_path / "in.jsonl", labelled)
    script("contrast").main(["nat", source, "-o", str(tmp_path / "o.parquet")])
    from po.data.read import read_file

    assert all(convert(r, SOURCE).row for r in read_file(tmp_path / "o.parquet", "o"))
    with pytest.raises(UserError, match="the lower first"):
        ran("contrast", "nat", "--", "--thresholds", "2", "1", output=tmp_path / "n.jsonl", rows=labelled)


@pytest.mark.slow
def test_a_kill_pays_nothing_twice(tmp_path: Path) -> None:
    """Killed while it asks: with the same command the rows are those of a run left alone, each asked for once."""
    source = write(tmp_path / "in.jsonl", [r for i, r in enumerate(rows(200)) if i not in (3, 4, 5)])
    with FakeOpenAI(teacher, delay=0.02) as server:
        args = ["--url", server.url, "--model", "m", "--concurrency", "4"]
        command = [sys.executable, str(ROOT / "data_prep" / "contrast.py"), "clair", source, *args]
        killed, alone = tmp_path / "killed.jsonl", tmp_path / "alone.jsonl"
        process = subprocess.Popen([*command, "-o", str(killed)], start_new_session=True, stdout=subprocess.DEVNULL)
        while process.poll() is None:
            if len(server.bodies) > 90:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            time.sleep(0.01)
        assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"
        subprocess.run([*command, "-o", str(killed)], check=True, stdout=subprocess.DEVNULL)
        paid = [b["messages"][0]["content"] for b in server.bodies]
        assert len(set(paid)) == 197
        assert len(paid) <= 197 + 4, "only what was under way at the kill is asked again"
        script("contrast").main([*command[2:], "-o", str(alone)])
    assert killed.read_bytes() == alone.read_bytes()
    sums = [json.loads(Path(f"{o}.report.json").read_text())["sums"] for o in (killed, alone)]
    assert sums[0] == sums[1]


def words(body: dict[str, Any]) -> str:
    """A teacher of the tiny model's words: puts w9 in the place of the first."""
    old = body["messages"][0]["content"].split("<answer")[-1].partition(">\n")[2].partition("\n</answer")[0]
    return f"{CLAIR.marker if CLAIR.marker in body['messages'][0]['content'] else BMC.marker} w9 {old.split(' ', 1)[1]}"


@pytest.mark.parametrize(("kind", "head"), [("clair", "apo_zero"), ("bmc", "bmc"), ("nat", "nat")])
def test_the_rows_train_the_head_that_they_are_for(tmp_path: Path, kind: str, head: str) -> None:
    texts = ["w1 w2 w3 w4", "w3 w4 w5 w6", "w5 w6 w7 w8", "w7 w8 w1 w2"]
    given = [{"id": f"p{i}", "prompt": f"w{i} ", "chosen": "w20 w21", "rejected": t} for i, t in enumerate(texts)]
    with FakeOpenAI(words) as server:
        args = [] if kind == "nat" else ["--url", server.url, "--model", "m"]
        made, _ = ran("contrast", kind, "--", *args, output=tmp_path / "o.jsonl", rows=given)
    assert len(made) == (8 if kind == "nat" else 4)
    assert kind == "nat" or made[0]["chosen"] == "w9 w2 w3 w4"
    net = make_model(tmp_path / "model")
    reference = {"from": "init", "kind": "adapter_off"} if HEADS[head].needs.any_reference else "none"
    changes = {"loss": [{"head": head}], "reference": reference, "train": {"per_device_train_batch_size": 2}}
    train(*load(write_recipe(tmp_path / "r.yaml", net, tmp_path / "o.jsonl", tmp_path / "run", **changes)))
    steps = [line for line in logs(tmp_path / "run") if "grad_norm" in line]
    assert steps
    assert all(line["grad_norm"] > 0 for line in steps)
