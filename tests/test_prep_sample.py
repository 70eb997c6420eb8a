"""K responses per prompt: how they are drawn, which stay, and that training reads them as they were sampled."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_openai import FakeOpenAI, completion
from prep_support import ROOT, ran, script, write
from tiny import make_model

from po.data.build import Build
from po.data.overlong import Limits
from po.data.read import Record
from po.data.rows import Example
from po.data.sources import open_sources
from po.data.tokenize import Encoder
from po.data.wanted import Wanted
from po.errors import UserError
from po.policy import load_frozen, load_tokenizer, tokenizer_key
from po.prep.rows import EVERYTHING, ScoredSet, read_set
from po.prep.sample import Draws
from po.prep.sample_distinct import NEAR, SAME, Distinct
from po.spec import ModelSpec, Source

TEMPLATE = (
    "{% for m in messages %}{{ {'user': 'w1 ', 'system': 'w2 ', 'assistant': 'w3 '}[m['role']] + m['content'] + ' ' }}"
    "{% if m['role'] == 'assistant' %}{{ '</s>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}w3 {% endif %}"
)
SOURCE = Source("x")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_model(tmp_path_factory.mktemp("plain"), max_position_embeddings=64))


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = make_model(tmp_path_factory.mktemp("talks"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    return str(folder)


def examples(rows: list[dict[str, Any]], folder: Path, model: str) -> list[Example]:
    """What training reads of rows that were scored afterwards."""
    scored = [{**row, "responses": [{**r, "reward": float(k)} for k, r in enumerate(row["responses"])]} for row in rows]
    opened = open_sources((Source(write(folder / "scored.jsonl", scored)),), "train")
    tokenizer = load_tokenizer(ModelSpec(model))
    build = Build(
        opened,
        Encoder(tokenizer, tokenizer_key(tokenizer)),
        Limits(64, None, "error", 2),
        1,
        "train",
        Wanted(logps=True),
    )
    return list(build.examples())


PROMPTS = [
    {"id": "a", "prompt": "w5 w6 w7", "topic": "t", "answer": "w9"},
    {"question": "w8"},
    {"prompt": [{"role": "user", "content": "w5 w6"}], "level": 2},
]
LOCAL = ("--device", "cpu", "--max-tokens", "6")


def behaviour(example: Example, model: str, temperature: float = 1.0) -> list[list[float]]:
    """The log-probs of an example's responses, by a forward of their own."""
    net: Any = load_frozen(ModelSpec(model))
    out = []
    for ids in example.response_ids:
        with torch.no_grad():
            logits = net(input_ids=torch.tensor([[*example.prompt_ids, *ids]])).logits[
                0, len(example.prompt_ids) - 1 : -1
            ]
        logp_TV = (logits.float() / temperature).log_softmax(-1)
        out.append(logp_TV.gather(1, torch.tensor(ids)[:, None])[:, 0].tolist())
    return out


@pytest.mark.parametrize("chat", [False, True])
def test_training_reads_the_very_tokens_that_were_sampled(tmp_path: Path, plain: str, talks: str, chat: bool) -> None:
    model, prompts = (talks, PROMPTS) if chat else (plain, PROMPTS[:2])
    out = tmp_path / "o.jsonl"
    rows, report = ran("sample", "--model", model, "-k", "3", "--refill", "9", *LOCAL, output=out, rows=prompts)
    assert [r["id"] for r in rows] == ["a", "o-in.jsonl:2", "o-in.jsonl:3"][: len(prompts)]
    assert (rows[0]["topic"], rows[0]["answer"]) == ("t", "w9")
    found = examples(rows, tmp_path, model)
    tokenizer = load_tokenizer(ModelSpec(model))
    assert len(found) == len(prompts)
    for row, example in zip(rows, found, strict=True):
        assert len(example.response_ids) == 3
        assert [r["source"] for r in row["responses"]] == [model] * 3
        for k, r in enumerate(row["responses"]):
            assert list(example.response_ids[k]) == r["token_ids"]
            assert (r["token_ids"][-1] == tokenizer.eos_token_id) == r.get("ended", True)
            assert r["content"].split() == tokenizer.decode(r["token_ids"], skip_special_tokens=True).split()
        assert example.logps is not None
        for ours, theirs in zip(example.logps, behaviour(example, model), strict=True):
            assert list(ours) == pytest.approx(theirs, abs=1e-5)
    want = [(1, 8, 9, 10), (1, 11), (4, 8, 9, 6)]
    assert [e.prompt_ids for e in found] == want[: len(found)]
    drawn = sum(len(r["token_ids"]) for row in rows for r in row["responses"])
    assert report["sums"]["completion tokens"] >= drawn
    assert report["sums"]["responses kept"] == 3 * len(prompts)


def test_a_text_becomes_a_users_message_on_demand(tmp_path: Path, talks: str) -> None:
    rows, _ = ran(
        "sample",
        "--model",
        talks,
        "-k",
        "2",
        "--chat",
        "--refill",
        "9",
        *LOCAL,
        output=tmp_path / "o.jsonl",
        rows=PROMPTS,
    )
    assert rows[0]["prompt"] == [{"role": "user", "content": "w5 w6 w7"}]
    assert [e.prompt_ids for e in examples(rows, tmp_path, talks)] == [(4, 8, 9, 10, 6), (4, 11, 6), (4, 8, 9, 6)]


def test_the_same_command_gives_the_same_bytes_and_another_seed_other_ones(tmp_path: Path, plain: str) -> None:
    def sample(name: str, *more: str) -> bytes:
        ran("sample", "--model", plain, "-k", "3", *LOCAL, *more, output=tmp_path / name, rows=PROMPTS[:1])
        return (tmp_path / name).read_bytes()

    assert sample("a.jsonl") == sample("b.jsonl")
    assert sample("c.jsonl", "--seed", "1") != sample("b.jsonl")


@pytest.mark.slow
def test_ray_actors_give_the_same_bytes(tmp_path: Path, plain: str) -> None:
    pytest.importorskip("ray")
    rows = [{"id": str(i), "prompt": f"w{i % 7} w{i % 5}"} for i in range(20)]
    argv = ["--model", plain, "-k", "3", "--refill", "2", "--batch", "4", *LOCAL]
    ran("sample", *argv, output=tmp_path / "a.jsonl", rows=rows)
    source = str(tmp_path / "a-in.jsonl")
    command = [sys.executable, str(ROOT / "data_prep" / "sample.py"), source, "-o", str(tmp_path / "b.jsonl"), *argv]
    subprocess.run([*command, "--ray", "2", "--ray-gpus", "0"], check=True)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


def test_system_prompts_that_the_row_does_not_show(tmp_path: Path, talks: str) -> None:
    """Sampled after another prompt than the row's: log-probs are the sampler's, the prompt's ids the row's."""
    argv = ["--model", talks, "-k", "4", "--temperature", "0.5", "2", "--system", "", "w20", "--seed", "3", *LOCAL]
    rows, _ = ran("sample", *argv, output=tmp_path / "o.jsonl", rows=PROMPTS[2:])
    (example,) = examples(rows, tmp_path, talks)
    assert example.prompt_ids == (4, 8, 9, 6)
    said = rows[0]["responses"]
    assert sorted((r.get("system", ""), r["temperature"]) for r in said) == [
        ("", 0.5),
        ("", 2),
        ("w20", 0.5),
        ("w20", 2),
    ]
    assert example.logps is not None
    for k, r in enumerate(said):
        prompt = (5, 23, 4, 8, 9, 6) if "system" in r else example.prompt_ids
        one = replace(example, prompt_ids=prompt, response_ids=(tuple(r["token_ids"]),))
        assert list(example.logps[k]) == pytest.approx(behaviour(one, talks, r["temperature"])[0], abs=1e-5)


def test_system_prompts_in_the_prompt_make_rows_of_their_own(tmp_path: Path, talks: str) -> None:
    argv = ["--model", talks, "-k", "4", "--system", "w20", "w21", "--system-in-prompt", *LOCAL]
    rows, _ = ran("sample", *argv, output=tmp_path / "o.jsonl", rows=[{"id": "r", **PROMPTS[2]}])
    assert [r["id"] for r in rows] == ["r/system-0", "r/system-1"]
    assert [r["prompt"][0] for r in rows] == [{"role": "system", "content": c} for c in ("w20", "w21")]
    for row, example, w in zip(rows, examples(rows, tmp_path, talks), (23, 24), strict=True):
        assert len(row["responses"]) == 2
        assert "system" not in row["responses"][0]
        assert example.prompt_ids == (5, w, 4, 8, 9, 6)
        assert example.logps is not None
        assert list(example.logps[1]) == pytest.approx(behaviour(example, talks)[1], abs=1e-5)


def test_every_pair_of_system_prompt_and_temperature_comes_up_in_turn() -> None:
    for S, T in ((2, 2), (2, 3), (4, 6), (1, 3), (3, 1)):
        draws = Draws(k=1, systems=tuple(map(str, range(S))), temperatures=tuple(map(float, range(T))))
        assert Counter(draws.way(j) for j in range(2 * S * T)) == Counter(
            {(str(s), float(t)): 2 for s in range(S) for t in range(T)}
        )
    drawn = Draws(k=1, systems=("a", "b"), system_by="lot")
    assert {drawn.way(j, "row")[0] for j in range(20)} == {"a", "b"}
    assert [drawn.way(j, "row") for j in range(20)] != [drawn.way(j, "other") for j in range(20)]


def test_what_says_nothing_new() -> None:
    seen = Distinct(0.5)
    assert seen.add("The cat sat on the mat") is None
    assert seen.add(" the  CAT sat on the mat\n") == SAME
    assert seen.add("The cat sat on the mat today") == NEAR  # 4 of 5 triples
    assert seen.add("The cat ran off the mat today") is None
    assert Distinct(1.0).add("x") is None
    strict = Distinct(1.0)
    assert strict.add("a b c d e f") is None
    assert strict.add("a b c d e g") is None


def asked(body: dict[str, Any]) -> str:
    return str(body["messages"][-1]["content"]) if "messages" in body else str(body["prompt"])


def served(tmp_path: Path, answer: Any, rows: list[dict[str, Any]], *argv: str) -> Any:
    """Rows, report, and the bodies that the server got."""
    with FakeOpenAI(answer) as server:
        more = ["--model", "m", "--url", server.url, "--concurrency", "1", "--retries", "0", *argv]
        rows, report = ran("sample", *more, output=tmp_path / "o.jsonl", rows=rows)
        return rows, report, server.bodies


def test_near_duplicates_go_and_are_drawn_again_within_the_budget(tmp_path: Path) -> None:
    said = iter([
        ["a b c d", "A b  c d", "x y z"], ["x Y z"], ["new"],  # row 1: three in all, with two draws more
        ["a", "a", "a"], ["a", "a"], ["a"],  # row 2: never
        ["a", "b", "c"],
    ])  # fmt: skip
    prompts = [{"id": n, "prompt": [{"role": "user", "content": n}]} for n in "pqr"]
    rows, report, bodies = served(
        tmp_path, lambda body: next(said), prompts, "-k", "3", "--refill", "3", "--batch", "1"
    )
    assert [r["id"] for r in rows] == ["p", "r"]
    assert [r["content"] for r in rows[0]["responses"]] == ["a b c d", "x y z", "new"]
    assert [(asked(b), b["n"]) for b in bodies] == [
        ("p", 3), ("p", 1), ("p", 1), ("q", 3), ("q", 2), ("q", 1), ("r", 3),
    ]  # fmt: skip
    assert len({b["seed"] for b in bodies}) == 7
    assert report["dropped"] == {"fewer than 2 responses": 1}
    assert report["ids"] == {"fewer than 2 responses": ["q"]}
    sums = report["sums"]
    assert sums["responses kept"] == 3 + 1 + 3
    assert sums["responses left out: the same as another"] == 2 + 5
    assert sums["responses asked for again"] == 2 + 3


def test_equal_responses_stay_on_demand_and_empty_ones_never(tmp_path: Path) -> None:
    rows, report, _ = served(tmp_path, lambda b: ["a", "a", " "], PROMPTS[2:], "-k", "3", "--duplicates", "keep")
    assert [r["content"] for r in rows[0]["responses"]] == ["a", "a"]
    assert report["sums"]["responses left out: empty"] == 1


@pytest.mark.parametrize(("truncated", "kept"), [("keep", ["a", "b", "c"]), ("drop", ["a", "c"])])
def test_responses_cut_at_the_limit(tmp_path: Path, truncated: str, kept: list[str]) -> None:
    def cut(body: dict[str, Any]) -> dict[str, Any]:
        said = completion(body, ["a", "b", "c"])
        said["choices"][1]["finish_reason"] = "length"
        return said

    rows, report, _ = served(tmp_path, cut, PROMPTS[2:], "-k", "3", "--truncated", truncated)
    assert [r["content"] for r in rows[0]["responses"]] == kept
    assert [r.get("ended") for r in rows[0]["responses"]] == [None, False, None][: len(kept)] or truncated == "drop"
    assert report["sums"].get("responses left out: cut at --max-tokens", 0) == 3 - len(kept)


def test_requests_that_fail_are_counted_and_rows_without_answers_dropped_by_name(tmp_path: Path) -> None:
    def some(body: dict[str, Any]) -> Any:
        return 400 if asked(body) == "none" or body["temperature"] == 2 else ["a b", "c d"]

    prompts = [{"id": n, "prompt": [{"role": "user", "content": n}]} for n in ("some", "none")]
    rows, report, _ = served(tmp_path, some, prompts, "-k", "4", "--temperature", "1", "2")
    assert [len(r["responses"]) for r in rows] == [2]
    assert report["dropped"] == {"no answer: HTTP 400: failed as asked: #": 1}
    assert report["sums"]["responses not given: HTTP 400: failed as asked: #"] == 2 + 4


def test_log_probs_of_a_server_count_where_it_gives_the_tokens(tmp_path: Path) -> None:
    def known(body: dict[str, Any]) -> dict[str, Any]:
        said = completion(body, ["a b", "c d"], prompt_token_ids=[1, 2])
        for choice in said["choices"] if body.get("return_token_ids") else ():
            choice["token_ids"] = [5, 6 + choice["index"]]
        return said

    rows, report, bodies = served(tmp_path, known, PROMPTS[2:], "-k", "2", "--server-token-ids")
    assert bodies[0]["logprobs"] is True
    assert [(r["token_ids"], r["logps"]) for r in rows[0]["responses"]] == [([5, 6], [-0.5] * 2), ([5, 7], [-0.5] * 2)]
    assert rows[0]["prompt_ids"] == [1, 2]
    assert "responses without token ids" not in report["sums"]
    rows, report, _ = served(tmp_path / "..", known, [{**PROMPTS[2], "n": 1}], "-k", "2")
    assert rows[0]["responses"][0] == {
        "content": "a b", "source": "m", "temperature": 1.0, "aside": {"logps": [-0.5, -0.5]},
    }  # fmt: skip
    assert "prompt_ids" not in rows[0]
    assert report["sums"]["responses without token ids"] == 2


def test_a_server_continues_texts_and_may_have_no_log_probs(tmp_path: Path) -> None:
    rows, report, bodies = served(tmp_path, lambda b: ["a", "b"], PROMPTS[:1], "-k", "2", "--no-logps", "--stop", "\n")
    assert report["sums"]["responses without log-probs"] == 2
    assert bodies[0]["prompt"] == "w5 w6 w7"
    assert bodies[0]["stop"] == ["\n"]
    assert "logprobs" not in bodies[0]
    assert [set(r) for r in rows[0]["responses"]] == [{"content", "source", "temperature"}] * 2


PAIR = {"id": "p", "prompt": "q", "chosen": "good", "rejected": "bad", "chosen_reward": 2, "rejected_reward": 1}
SET = {
    "id": "s",
    "prompt": "q",
    "responses": [{"content": "good", "reward": 2, "note": "n"}, {"content": "so so", "reward": 1}],
}


def test_own_responses_move_away_or_are_added_to(tmp_path: Path) -> None:
    answer = lambda body: ["Good", "new one", "other"]  # noqa: E731
    rows, report, _ = served(tmp_path, answer, [PAIR, SET], "-k", "3", "--add")
    assert [[r["content"] for r in row["responses"]] for row in rows] == [
        ["good", "bad", "new one", "other"], ["good", "so so", "new one", "other"],
    ]  # fmt: skip
    assert rows[0]["responses"][0] == {"content": "good", "was": "chosen", "aside": {"reward": 2.0}}
    assert rows[1]["responses"][0] == {"content": "good", "note": "n", "aside": {"reward": 2.0}}
    for row in rows:  # as score.py reads them
        assert isinstance(read_set(Record("w", row), SOURCE, replace(EVERYTHING, unscored=True)), ScoredSet)
    rows, report, _ = served(tmp_path, answer, [PAIR, SET], "-k", "3")
    assert [len(r["responses"]) for r in rows] == [3, 3]
    assert [r["content"] for r in rows[1]["original"]["responses"]] == ["good", "so so"]
    assert not {"chosen", "rejected"} & set(rows[0])
    assert report["sums"]["rows whose own responses moved into `original`"] == 2


def test_sampling_can_be_added_to_what_the_same_model_sampled(tmp_path: Path, plain: str) -> None:
    argv = ["--model", plain, "-k", "2", *LOCAL]
    first, _ = ran("sample", *argv, output=tmp_path / "a.jsonl", rows=PROMPTS[:1])
    both, _ = ran("sample", *argv, "--add", "--seed", "1", output=tmp_path / "b.jsonl", rows=first)
    assert both[0]["responses"][:2] == first[0]["responses"]
    (example,) = examples(both, tmp_path, plain)
    assert len(example.response_ids) == 4
    assert example.logps is not None


def test_a_text_prompt_has_no_room_for_a_system_prompt(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="1 of 2 rows are bad"):
        served(tmp_path, lambda b: ["a", "b"], [PROMPTS[0], PROMPTS[2]], "-k", "2", "--system", "be brief")
    report = json.loads((tmp_path / "o.jsonl.report.json").read_text())
    assert "o-in.jsonl:1: prompt: expected messages, for a system prompt (or --chat" in report["problems"][0]


def test_system_prompts_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "systems.txt").write_text("be brief\n\nbe kind\n")
    prompt = {"prompt": [{"role": "system", "content": "own"}, {"role": "user", "content": "q"}]}
    argv = ["-k", "2", "--system-file", str(tmp_path / "systems.txt")]
    rows, _, bodies = served(tmp_path, lambda b: b["messages"][0]["content"], [prompt], *argv)
    assert [[m["content"] for m in b["messages"]] for b in bodies] == [["be brief", "q"], ["be kind", "q"]]
    assert [(r["content"], r["system"]) for r in rows[0]["responses"]] == [("be brief",) * 2, ("be kind",) * 2]
    assert rows[0]["prompt"] == prompt["prompt"]


def test_a_dry_run_asks_and_writes_nothing(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", PROMPTS)
    with FakeOpenAI(lambda body: ["a", "b"]) as server:
        argv = [
            "-o",
            str(tmp_path / "o.jsonl"),
            "--model",
            "m",
            "--url",
            server.url,
            "-k",
            "2",
            "--dry-run",
            "--limit",
            "1",
        ]
        script("sample").main([source, *argv])
        assert len(server.bodies) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--temperature", "-1"], "--temperature: expected 0 to 2"),
        (["--near", "0"], "--near: expected above 0, at most 1"),
        (["--temperature", "0"], "--temperature 0: every draw is the same"),
        (["--system-in-prompt"], "--system-in-prompt: needs --system"),
        (["--ray", "2", "--url", "http://x/v1"], "--ray: is for models that are loaded"),
        (["--system-file", "none.txt"], "--system-file: there is no file none.txt"),
        (["--url", "localhost:8000"], "--url: expected an address that begins with http"),
        (["--timeout", "0", "--url", "http://x/v1"], "--timeout: expected more than 0"),
        (["--key-env", "NOT_SET_HERE", "--url", "http://x/v1"], "NOT_SET_HERE, which is not set"),
    ],
)
def test_the_script_refuses_what_cannot_be(tmp_path: Path, argv: list[str], said: str) -> None:
    source = write(tmp_path / "in.jsonl", PROMPTS)
    with pytest.raises(UserError) as e:
        script("sample").main([source, "-o", str(tmp_path / "o.jsonl"), "--model", "m", "-k", "2", *argv])
    assert said in str(e.value)


def test_the_script_runs_by_itself_with_help_and_exit_codes(tmp_path: Path, plain: str) -> None:
    assert "example:\n  python data_prep/sample.py" in script("sample").arguments().format_help()
    command = [sys.executable, str(ROOT / "data_prep" / "sample.py"), "nothing.jsonl", "-o", "o.jsonl", "-k", "2"]
    done = subprocess.run([*command, "--model", plain], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: nothing.jsonl not found")
