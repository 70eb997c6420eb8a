"""Asking models: a server that fails, a journal that is torn, a model in this process."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_openai import FakeOpenAI, completion
from tiny import make_model

from po.errors import UserError
from po.policy import load_frozen
from po.prep.chat import Answer, Ask, Dialogue, Numbered, Reply, together
from po.prep.endpoint import Endpoint, Service
from po.prep.local import Local
from po.prep.step import Outcome
from po.spec import ModelSpec

SECRET = "sk-tell-nobody-1234567890"


def user(text: str, **more: Any) -> Ask:
    return Ask(messages=({"role": "user", "content": text},), **more)


def text(content: str, **more: Any) -> Ask:
    return Ask(messages=({"role": "text", "content": content},), **more)


def last(body: dict[str, Any]) -> str:
    return str(body["messages"][-1]["content"])


def endpoint(server: FakeOpenAI, journal: Path | None = None, **more: Any) -> Endpoint:
    return Endpoint(Service(model="m", url=server.url, **more), journal)


def texts(answers: Sequence[Answer]) -> list[list[str]]:
    return [[r.text for r in a.replies] for a in answers]


class Echo:
    """A Chat without a model, which remembers what it was asked."""

    name = "echo"

    def __init__(self) -> None:
        self.calls: list[list[Ask]] = []

    def ask(self, asks: Sequence[Ask]) -> list[Answer]:
        self.calls.append(list(asks))
        return [Answer((Reply(a.messages[0]["content"].upper()),), sums={"requests": 1, "cost": 0.5}) for a in asks]


def test_dialogues_of_different_lengths_share_their_rounds() -> None:
    def counts(name: str, rounds: int) -> Dialogue:
        said: list[str] = []
        for k in range(rounds):
            answers = yield [user(f"{name}{k}"), user(f"{name}{k}'")][: 1 + k]
            said += [a.replies[0].text for a in answers]
        return Outcome(rows=({"said": said},), sums={"own": 1, "cost": 1})

    chat = Echo()
    found = together(chat, [counts("a", 2), counts("b", 0), counts("c", 1)], ["f:1", "f:2", "f:3"])
    assert [o.rows[0]["said"] for o in found] == [["A0", "A1", "A1'"], [], ["C0"]]
    assert [o.sums for o in found] == [
        {"own": 1, "cost": 2.5, "requests": 3}, {"own": 1, "cost": 1}, {"own": 1, "cost": 1.5, "requests": 1},
    ]  # fmt: skip
    assert [[(a.messages[0]["content"], a.of) for a in call] for call in chat.calls] == [
        [("a0", "f:1"), ("c0", "f:3")], [("a1", "f:1"), ("a1'", "f:1")],
    ]  # fmt: skip


def test_a_dialogue_that_asks_nothing_for_a_round_goes_on() -> None:
    def patient() -> Dialogue:
        nothing = yield []
        (answer,) = yield [user("x")]
        return Outcome(rows=({"said": [len(nothing), answer.replies[0].text]},))

    assert together(Echo(), [patient()])[0].rows == ({"said": [0, "X"]},)
    assert together(Echo(), []) == []


def test_keys_tell_requests_apart_by_all_they_say_and_count_equal_ones() -> None:
    a = user("x", of="f:1")
    others = [user("y", of="f:1"), user("x", of="f:2"), user("x", of="f:1", n=2), user("x", of="f:1", stop=("a",))]
    keys = Numbered("m")([a, a, *others])
    assert len({k.partition(".")[0] for k in keys}) == 5
    assert keys[0].endswith(".0")
    assert keys[1] == keys[0][:-1] + "1"
    assert Numbered("m")([a]) == keys[:1]
    assert Numbered("other")([a]) != keys[:1]


def test_answers_come_in_the_order_of_the_requests_and_no_more_at_once_than_allowed() -> None:
    def slow(body: dict[str, Any]) -> str:
        time.sleep(0.005 * (int(last(body)) % 4))
        return f"re {last(body)}"

    with FakeOpenAI(slow, delay=0.01) as server:
        found = endpoint(server, concurrency=3).ask([user(str(i)) for i in range(24)])
        assert texts(found) == [[f"re {i}"] for i in range(24)]
        assert server.most == 3
        endpoint(server, concurrency=1).ask([user(str(i)) for i in range(4)])
        assert server.most == 3


def test_what_is_asked_is_what_the_server_gets() -> None:
    ask = user("q", n=2, temperature=0.5, top_p=0.9, max_tokens=7, seed=3, stop=("\n",), top_logprobs=2)
    with FakeOpenAI(lambda body: "a b") as server:
        chat = endpoint(server)
        answers = chat.ask([ask, user("q"), text("once", top_logprobs=1), text("once")])
        bodies = sorted(server.bodies, key=lambda b: (b.get("prompt", ""), -b["n"], -b.get("logprobs", 0)))
        assert bodies[0] == {
            "model": "m", "messages": [{"role": "user", "content": "q"}], "n": 2, "temperature": 0.5, "top_p": 0.9,
            "max_tokens": 7, "seed": 3, "stop": ["\n"], "logprobs": True, "top_logprobs": 2,
        }  # fmt: skip
        assert not {"seed", "stop", "logprobs", "top_logprobs"} & set(bodies[1])
        assert bodies[2]["prompt"] == "once"
        assert bodies[2]["logprobs"] == 1
        assert "logprobs" not in bodies[3]
        assert {h["path"] for h in server.headers} == {"/v1/chat/completions", "/v1/completions"}
    reply = answers[0].replies[1]
    assert (reply.text, reply.finish_reason, reply.logprobs) == ("a b", "stop", (-0.5, -0.5))
    assert reply.top == ({"a": -0.5, "other1": -1.5}, {"b": -0.5, "other1": -1.5})
    assert answers[1].replies[0].logprobs is None
    assert answers[2].replies[0].top == ({"a": -0.5}, {"b": -0.5})


def test_switches_of_the_template_reach_a_server_and_tools_do_not() -> None:
    with FakeOpenAI(lambda body: "x") as server:
        asks = [user("q", template_kwargs={"enable_thinking": False}), user("q", tools=({"name": "add"},))]
        found = endpoint(server).ask(asks)
        assert [b["chat_template_kwargs"] for b in server.bodies] == [{"enable_thinking": False}]
    assert found[1].problem == "a prompt with tools, which servers are not asked with"


def test_token_ids_where_the_server_knows_them() -> None:
    def known(body: dict[str, Any]) -> dict[str, Any]:
        said = completion(body, "a b", prompt_token_ids=[1, 2])
        said["choices"][0]["token_ids"] = [7, 8, 9]
        return said if body.get("return_token_ids") else completion(body, "a b")

    with FakeOpenAI(known) as server:
        reply = endpoint(server, token_ids=True).ask([user("q")])[0].replies[0]
        assert (reply.token_ids, reply.prompt_ids) == ((7, 8, 9), (1, 2))
        assert endpoint(server).ask([user("q")])[0].replies[0].token_ids is None


def test_a_server_that_gives_one_reply_at_a_time_is_asked_for_the_rest(tmp_path: Path) -> None:
    with FakeOpenAI(lambda body: [f"seed {body['seed']}"]) as server:
        asks = [user("q", n=3, seed=5)] * 2
        found = endpoint(server, tmp_path / "calls").ask(asks)
        assert texts(found) == [["seed 5", "seed 6", "seed 7"]] * 2
        assert [a.sums["requests"] for a in found] == [3, 3]
        assert endpoint(server, tmp_path / "calls").ask(asks) == found
        assert len(server.bodies) == 6


@pytest.mark.parametrize("status", [429, 500, 0])
def test_what_may_pass_is_tried_again(status: int) -> None:
    with FakeOpenAI(lambda body: "yes", failures=1, status=status) as server:
        (found,) = endpoint(server).ask([user("q")])
        assert texts([found]) == [["yes"]]
        assert found.sums == {"requests": 1, "retries": 1, "prompt tokens": 1, "completion tokens": 1}


@pytest.mark.parametrize(
    ("said", "problem", "tries"),
    [
        (500, "HTTP 500: failed as asked: 500", 2),
        (400, "HTTP 400: failed as asked: 400", 1),
        ({"choices": None}, "the server's answer cannot be read: TypeError: 'NoneType' object is not iterable", 1),
        ([], "the server gave no reply", 1),
    ],
)
def test_what_does_not_pass_is_named_and_spoils_no_other(said: Any, problem: str, tries: int) -> None:
    with FakeOpenAI(lambda body: said if last(body) == "bad" else "fine") as server:
        found = endpoint(server, retries=1).ask([user("good"), user("bad")])
        assert texts(found) == [["fine"], []]
        assert found[1].problem == problem
        assert sum(last(b) == "bad" for b in server.bodies) == tries
        assert found[1].sums.get("retries", 0) == tries - 1


def test_a_server_that_is_too_slow() -> None:
    def slow(body: dict[str, Any]) -> str:
        time.sleep(0.6 if last(body) == "slow" else 0)
        return "fine"

    with FakeOpenAI(slow) as server:
        found = endpoint(server, timeout=0.2, retries=1).ask([user("slow"), user("fast")])
    assert [a.problem for a in found] == ["no answer within 0.2 s", None]
    assert found[0].sums == {"requests": 1, "retries": 1}


def test_log_probs_that_a_server_does_not_give() -> None:
    """Likeliest tokens are what is asked for where they are; a text without log-probs is a text."""
    with FakeOpenAI(lambda body: completion({"model": "m", "messages": body["messages"]}, "a b")) as server:
        found = endpoint(server).ask([user("q", logprobs=True), user("q", top_logprobs=2)])
    assert [a.problem for a in found] == [None, "the server gave no likeliest tokens (top_logprobs)"]
    assert found[0].replies == (Reply("a b", "stop"),)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_model_or_address_ends_the_run(status: int) -> None:
    with FakeOpenAI(lambda body: status) as server, pytest.raises(UserError) as e:
        endpoint(server, concurrency=1).ask([user(str(i)) for i in range(50)])
    assert f"{server.url}: model 'm': " in str(e.value)
    assert f"HTTP {status}" in str(e.value)
    assert len(server.bodies) < 5


def test_nobody_at_the_address_ends_the_run_and_may_be_mended() -> None:
    with FakeOpenAI(lambda body: "x") as server:
        pass
    with pytest.raises(UserError, match=r"nobody answers there .* the same command goes on"):
        endpoint(server, retries=0).ask([user("q")])


def test_the_key_is_sent_and_kept_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: Any
) -> None:
    monkeypatch.setenv("THE_KEY", SECRET)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another-server")
    monkeypatch.setenv("OPENAI_ORG_ID", "org-of-another-server")
    caplog.set_level("DEBUG")
    with FakeOpenAI(lambda body: f"your key is {SECRET}" if last(body) == "echo" else 400) as server:
        chat = endpoint(server, tmp_path / "calls", key_env="THE_KEY", retries=0)
        found = chat.ask([user("echo"), user("no")])
        assert {h["authorization"] for h in server.headers} == {f"Bearer {SECRET}"}
        assert texts(found)[0] == ["your key is [redacted]"]
        server.answer = lambda body: {"error": {"message": f"{SECRET} is odd"}}
        found += chat.ask([user("what")])
        endpoint(server).ask([user("what")])
        assert "another-server" not in str(server.headers)
        server.answer, server.status, server.failures = (lambda body: 401), 401, 0
        with pytest.raises(UserError) as e:
            chat.ask([user("other")])
    out = capfd.readouterr()
    for where in (str(found), str(e.value), out.out, out.err, caplog.text, (tmp_path / "calls").read_text()):
        assert SECRET not in where


def test_a_key_that_is_not_set_is_named_and_one_given_in_its_place_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(UserError, match="MY_KEY, which is not set"):
        Endpoint(Service(model="m", url="http://x/v1", key_env="MY_KEY"))
    with pytest.raises(UserError, match="not shown") as e:
        Endpoint(Service(model="m", url="http://x/v1", key_env=SECRET))
    assert SECRET not in str(e.value)


def test_costs_add_up_and_a_journal_is_paid_once(tmp_path: Path) -> None:
    prices = {"price_in": 2.0, "price_out": 10.0}
    asks = [user("one two three", n=2), user("four")]
    with FakeOpenAI(lambda body: "a b") as server:
        found = endpoint(server, tmp_path / "calls", **prices).ask(asks)
        assert [a.sums["cost ($)"] for a in found] == [(3 * 2 + 4 * 10) / 1e6, (1 * 2 + 2 * 10) / 1e6]
        server.answer = lambda body: "changed"
        again = endpoint(server, tmp_path / "calls", **prices)
        assert again.ask(asks) == found
        assert len(server.bodies) == 2
        assert texts(again.ask(asks)) == [["changed", "changed"], ["changed"]]  # asked a second time: other requests
    lines = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    assert len(lines) == 4
    assert sum(line["sums"]["cost ($)"] for line in lines[:2]) == pytest.approx(sum(a.sums["cost ($)"] for a in found))


def test_a_torn_line_is_cut_off_and_asked_again(tmp_path: Path) -> None:
    journal = tmp_path / "calls"
    with FakeOpenAI(lambda body: f"re {last(body)}") as server:
        asks = [user("a"), user("b")]
        found = endpoint(server, journal, concurrency=1).ask(asks)
        whole = journal.read_bytes()
        journal.write_bytes(whole[:-9])
        assert endpoint(server, journal).ask(asks) == found
        assert [last(b) for b in server.bodies] == ["a", "b", "b"]
        assert journal.read_bytes() == whole
        journal.write_bytes(b"{}\n" + whole)
        with pytest.raises(UserError, match="byte 0: expected a line that a run of data_prep wrote"):
            endpoint(server, journal).ask(asks)


def test_a_dry_run_reads_the_journal_and_writes_none(tmp_path: Path) -> None:
    service = {"model": "m"}
    with FakeOpenAI(lambda body: "x") as server:
        dry = Endpoint(Service(url=server.url, **service), tmp_path / "calls", read_only=True)
        dry.ask([user("a")])
        assert not (tmp_path / "calls").exists()
        endpoint(server, tmp_path / "calls").ask([user("a")])
        before = (tmp_path / "calls").read_bytes()
        Endpoint(Service(url=server.url, **service), tmp_path / "calls", read_only=True).ask([user("a"), user("b")])
        assert (tmp_path / "calls").read_bytes() == before
        assert [last(b) for b in server.bodies] == ["a", "a", "b"]


STEP = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    from po.prep.chat import Ask, together
    from po.prep.endpoint import Endpoint, Service
    from po.prep.step import Outcome, run_step
    from po.spec import Source

    def twice(record):
        said = []
        for k in range(2):
            (a,) = yield [Ask(messages=({"role": "user", "content": f"{record.data['n']}"},), max_tokens=5 + k)]
            said.append(a.replies[0].text)
        return Outcome(rows=({"n": record.data["n"], "said": said},))

    folder, url = Path(sys.argv[1]), sys.argv[2]
    chat = Endpoint(Service(model="m", url=url, concurrency=2), folder / "out.jsonl.calls.jsonl")
    work = lambda records: together(chat, [twice(r) for r in records], [r.where for r in records])
    run_step("t", [Source(str(folder / "in.jsonl"))], folder / "out.jsonl", options={}, batch_work=work, batch=4)
    """
)


def test_kill_9_and_the_same_command_again_pays_nothing_twice(tmp_path: Path) -> None:
    """Rows 0 to 11, of which several say the same; every answer that the server gives is another."""
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"n": i % 5}) + "\n" for i in range(12)))
    (tmp_path / "step.py").write_text(STEP)
    journal, given = tmp_path / "out.jsonl.calls.jsonl", iter(range(1000))

    def start() -> subprocess.Popen[bytes]:
        command = [sys.executable, str(tmp_path / "step.py"), str(tmp_path), server.url]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})

    def lines() -> list[dict[str, Any]]:
        found = journal.read_bytes() if journal.exists() else b""
        return [json.loads(line) for line in found[: found.rfind(b"\n") + 1].splitlines()]

    with FakeOpenAI(lambda body: f"answer {next(given)}", delay=0.05) as server:
        for most in (3, 11):
            process = start()
            while len(lines()) < most and process.poll() is None:
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
            process.wait()
        paid = lines()
        assert 11 <= len(paid) < 24
        assert start().wait() == 0
        assert lines()[: len(paid)] == paid
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    said = [text for row in rows for text in row["said"]]
    assert [row["n"] for row in rows] == [i % 5 for i in range(12)]
    assert len(lines()) == 24
    assert sorted(said) == sorted(line["replies"][0]["text"] for line in lines())  # each answer once, in its own row
    assert len(set(said)) == 24
    assert len(server.bodies) <= 24 + 2 * 2  # what was on its way when it was killed
    report = json.loads((tmp_path / "out.jsonl.report.json").read_text())
    assert report["sums"]["requests"] == 24


TEMPLATE = (
    "{% for m in messages %}{{ 'w2' if m['role'] == 'assistant' else 'w1' }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}w2{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), max_position_embeddings=64)


def test_a_model_here_gives_tokens_with_their_log_probs(folder: Path) -> None:
    chat = Local(str(folder), device="cpu")
    asks = [
        text("w3 w4 w5", n=3, max_tokens=6, temperature=0.7, top_logprobs=4),
        text("w9", max_tokens=4, logprobs=True),
    ]
    found = chat.ask(asks)
    net: Any = load_frozen(ModelSpec(str(folder)))
    for ask, answer in zip(asks, found, strict=True):
        assert len(answer.replies) == ask.n
        for r in answer.replies:
            assert r.token_ids is not None
            assert r.prompt_ids is not None
            with torch.no_grad():
                logits = net(input_ids=torch.tensor([[*r.prompt_ids, *r.token_ids]])).logits[0]
            logp_TV = (logits[len(r.prompt_ids) - 1 : -1] / ask.temperature).log_softmax(-1)
            torch.testing.assert_close(
                torch.tensor(r.logprobs), logp_TV.gather(1, torch.tensor(r.token_ids)[:, None])[:, 0], atol=1e-5, rtol=0
            )
            if ask.top_logprobs:
                assert r.top is not None
                values, ids = logp_TV.topk(4)
                for place, v, i in zip(r.top, values, ids, strict=True):
                    assert list(place) == [chat.tokenizer.decode([k]) for k in i.tolist()]
                    torch.testing.assert_close(torch.tensor(list(place.values())), v, atol=1e-5, rtol=0)
    assert found[0].sums == {
        "requests": 1, "prompt tokens": 4, "completion tokens": sum(len(r.token_ids or ()) for r in found[0].replies),
    }  # fmt: skip
    assert len({r.token_ids for r in found[0].replies}) == 3
    assert Local(str(folder), device="cpu").ask(asks) == found
    assert chat.ask(asks) != found  # asked again: drawn anew


def test_a_model_here_says_where_a_prompt_does_not_fit_and_answers_the_others(folder: Path) -> None:
    found = Local(str(folder), device="cpu").ask([text("w3 " * 60, max_tokens=8), text("w3", max_tokens=8)])
    assert found[0].problem == "prompt and max_tokens are more than the 64 tokens that the model takes"
    assert found[1].problem is None


def test_plain_texts_conversations_and_templates(folder: Path, tmp_path: Path) -> None:
    bare = Local(str(folder), device="cpu")
    assert bare.prompt_ids(user("w3").messages) == bare.prompt_ids(text("w3").messages) == (1, 6)
    with pytest.raises(UserError, match="no chat template, which a conversation needs"):
        bare.ask([Ask(messages=({"role": "system", "content": "w1"}, {"role": "user", "content": "w3"}))])
    chat = Local(str(folder), device="cpu")
    chat.tokenizer.chat_template = TEMPLATE
    assert chat.prompt_ids(user("w3").messages) == (4, 6, 5)
    assert chat.prompt_ids(text("w3").messages) == (1, 6)
    said, continued = chat.ask([user("w3", max_tokens=4, seed=1), text("w3", max_tokens=4, seed=1)])
    assert said.replies[0].text == said.replies[0].text.strip()  # the template's space is no part of the message
    assert continued.replies[0].text[0] == " "
    chat.tokenizer.chat_template = "{{ word }}{% for t in tools %} {{ t['name'] }}{% endfor %}"
    (answer,) = chat.ask([user("w3", tools=({"name": "w7"},), template_kwargs={"word": "w8"}, max_tokens=2)])
    assert answer.replies[0].prompt_ids == (11, 10)


def test_a_stop_text_ends_an_answer(folder: Path) -> None:
    chat = Local(str(folder), device="cpu")
    (whole,) = chat.ask([text("w3", max_tokens=12, seed=1, logprobs=True)])[0].replies
    words = re.findall(r"w\d+", whole.text)
    (cut,) = chat.ask([text("w3", max_tokens=12, seed=1, logprobs=True, stop=(words[4],))])[0].replies
    assert cut.text == whole.text[: whole.text.index(words[4])]
    assert (cut.finish_reason, cut.token_ids) == ("stop", None)
    assert whole.logprobs is not None
    assert cut.logprobs is not None
    assert cut.logprobs == whole.logprobs[: len(cut.logprobs)]
    assert len(cut.logprobs) in (words.index(words[4]), words.index(words[4]) + 1)
