"""The sandbox: a reward that cannot be gamed, rows and a model that load, and a report that tells models apart."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from po.errors import POError, UserError
from po.sandbox import Pretraining, Sandbox, Size, build, evaluate, reward, sample, world
from po.sandbox.demo import command, fresh, report
from po.sandbox.display import show
from po.sandbox.evaluation import estimate, load
from po.sandbox.pretrain import CHAT_TEMPLATE, EOS
from po.sandbox.questions import KINDS, Question, demonstration, wanted
from po.sandbox.sampling import log_probs
from po.sandbox.store import find

MICRO = Size(
    train=12,
    eval=4,
    held_out=8,
    responses=3,
    pretraining=Pretraining(hidden_size=32, intermediate_size=64, layers=2, heads=2, vocab_size=400, steps=20, batch=8),
)
ASK = "Name three fruits and two tools."
RIGHT = "plum, fig, apple, saw, drill."


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Sandbox:
    return build(tmp_path_factory.mktemp("sandbox") / "s", 3, MICRO)


@pytest.fixture(scope="module")
def models(sandbox: Sandbox, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Base, base with an adapter that changes it, and the tokenizer."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(sandbox.model)
    policy = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    folder = tmp_path_factory.mktemp("run") / "export-adapter"
    policy.save_pretrained(folder)
    return *load(sandbox.model, folder), folder


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# The reward


def test_reward_by_hand() -> None:
    assert reward(ASK, RIGHT) == 1
    assert reward([{"role": "user", "content": ASK}], "saw drill apple fig plum") == 1  # any order, any commas
    assert reward(ASK, "") == reward(ASK, " ., ") == 0
    assert reward(ASK, "well, let me think.") == 0
    assert reward(ASK, "plum, fig, saw.") == pytest.approx(3 / 5)  # two left out
    assert reward(ASK, "plum, fig, apple, saw, drill, dog.") == pytest.approx(5 / 6)  # of another kind
    assert reward(ASK, "plum, fig, apple, pear, saw, drill.") == pytest.approx(5 / 6)  # too many
    assert reward(ASK, "plum, plum, fig, apple, saw, drill.") == pytest.approx(5 / 6)  # repeated
    assert reward(ASK, "i would say plum, fig, apple, saw, drill.") == pytest.approx(5 / 8)  # rambling
    assert reward(ASK, "plum, fig, apple, saw, drill <|user|>") == pytest.approx(5 / 6)  # a special token is a word
    assert reward("Give me one bird and one tree.", "owl, oak") == 1


def test_length_and_repetition_buy_nothing() -> None:
    """No word that is appended or doubled raises an answer's reward, unless it names a thing still asked for."""
    rng, everything = random.Random(0), [t for things in KINDS.values() for t in things]
    for question, _ in itertools.islice(world(0).corpus(), 300):
        named = rng.sample(everything, rng.randint(0, 12)) + rng.choices(everything, k=rng.randint(0, 3))
        answer = ", ".join(named)
        before = reward(question, answer)
        useful = {
            t for kind, n in wanted(question) if len(set(named).intersection(KINDS[kind])) < n for t in KINDS[kind]
        }
        for word in rng.sample(everything, 20) + named + ["maybe", "!!!", "1", "and"]:
            longer = reward(question, f"{answer}, {word}")
            if word in useful and word not in named:
                assert longer > before
            else:
                assert longer < before or longer == before == 0
        assert reward(question, ", ".join(dict.fromkeys(named))) >= before  # deduplicated
        assert reward(question, answer + ", ,...") == before
        assert 0 <= before <= 1


def test_naming_everything_scores_low() -> None:
    everything = ", ".join(t for things in KINDS.values() for t in things)
    for q in world(1).held_out:
        assert reward(q.text, everything) == pytest.approx(sum(n for _, n in q.wanted) / 120)
        assert reward(q.text, everything) < 0.09
        of_its_kinds = ", ".join(t for kind, _ in q.wanted for t in KINDS[kind])
        assert reward(q.text, of_its_kinds) == pytest.approx(sum(n for _, n in q.wanted) / (12 * len(q.wanted)))


def test_reward_of_another_prompt() -> None:
    with pytest.raises(UserError) as e:
        reward("What is love?", "plum")
    assert str(e.value) == (
        "sandbox reward: prompt: got 'What is love?', expected a question like 'Name three fruits and two tools.' "
        "Score other prompts with a reward of their own."
    )


# The world


def test_question_reads_as_it_was_meant() -> None:
    q = Question((("fruit", 1), ("bird", 3), ("tree", 2)), "Give me {}.")
    assert q.text == "Give me one fruit, three birds and two trees."
    assert all(wanted(q.text) == q.wanted for q in world(5).train)
    assert len({t for things in KINDS.values() for t in things}) == 120


def test_sets_and_corpus_are_disjoint() -> None:
    w = world(0)
    sets = [{frozenset(wanted(q.text)) for q in s} for s in (w.train, w.eval, w.held_out)]
    assert [len(s) for s in sets] == [len(w.train), len(w.eval), len(w.held_out)]
    corpus = {frozenset(wanted(q)) for q, _ in itertools.islice(w.corpus(), 3000)}
    for a, b in itertools.combinations([*sets, corpus], 2):
        assert not a & b
    assert world(0) == w != world(1)
    assert list(itertools.islice(w.corpus(), 5)) == list(itertools.islice(world(0).corpus(), 5))


def test_corpus_mixes_good_and_sloppy() -> None:
    scores = torch.tensor([reward(q, a) for q, a in itertools.islice(world(0).corpus(), 2000)])
    assert 0.6 < scores.mean() < 0.8
    assert 0.3 < (scores == 1).float().mean() < 0.6
    assert (scores < 0.5).float().mean() > 0.1
    assert all(demonstration(Question((("fruit", 1), ("tree", 1))), random.Random(i)) != "." for i in range(300))


def test_world_too_large() -> None:
    with pytest.raises(UserError, match=r"got 1900 \+ 64 \+ 256 questions, expected at most 2000"):
        world(0, 1900, 64, 256)


# Building


def test_files_load_elsewhere(sandbox: Sandbox) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(sandbox.model), AutoTokenizer.from_pretrained(sandbox.model)
    assert (sandbox.model / "model.safetensors").is_file()
    assert model.num_parameters() == sandbox.manifest()["parameters"]
    assert tokenizer.chat_template == CHAT_TEMPLATE
    talk = [{"role": "user", "content": ASK}, {"role": "assistant", "content": RIGHT}]
    prompt = tokenizer.apply_chat_template(talk[:1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(talk, tokenize=False)
    assert whole == f"<|bos|><|user|> {ASK}<|assistant|> {RIGHT}{EOS}"
    ids = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in (prompt, whole)]
    assert ids[1][: len(ids[0])] == ids[0]  # the boundary between prompt and response is a boundary of tokens
    assert tokenizer.decode(ids[1]) == whole


def test_rows(sandbox: Sandbox) -> None:
    found = {name: rows(getattr(sandbox, name)) for name in ("train", "eval", "held_out")}
    assert [len(found[n]) for n in ("train", "eval", "held_out")] == [12, 4, 8]
    assert [r["prompt"] for r in found["train"]] == [q.messages for q in world(3, 12, 4, 8).train]
    for row in found["train"] + found["eval"]:
        assert set(row) == {"id", "prompt", "responses"}
        for r in row["responses"]:
            assert r == {"content": r["content"], "reward": round(reward(row["prompt"], r["content"]), 6)}
    assert found["held_out"][0].keys() == {"id", "prompt"}
    assert sandbox.prompts() == [r["prompt"] for r in found["held_out"]]


def test_rows_are_read_by_po(sandbox: Sandbox, tmp_path: Path) -> None:
    from po.data.prepare import prepare
    from po.policy import load_tokenizer, tokenizer_key
    from po.spec import DataSpec, ModelSpec, Source

    tokenizer = load_tokenizer(ModelSpec(str(sandbox.model)))
    sources = (Source(str(sandbox.train)),)
    prepared = prepare(
        DataSpec(sources, max_length=256, cache_dir=str(tmp_path)),
        sources,
        tokenizer,
        tokenizer_key(tokenizer),
        "train",
    )
    for example, row in zip(prepared.examples, rows(sandbox.train), strict=True):
        assert example.reward == pytest.approx([r["reward"] for r in row["responses"]])
        assert all(ids[-1] == tokenizer.eos_token_id for ids in example.response_ids)


def test_same_seed_same_content(sandbox: Sandbox, tmp_path: Path) -> None:
    again = build(tmp_path / "again", 3, MICRO)
    assert again.manifest()["files"] == sandbox.manifest()["files"]


def test_kept_until_something_changes(sandbox: Sandbox, tmp_path: Path) -> None:
    said: list[str] = []
    out = tmp_path / "kept"
    tiny = Size(2, 1, 1, 2, Pretraining(32, 64, 1, 2, 300, steps=1, batch=2))
    build(out, 0, tiny, lambda what, done, total: said.append(what))
    assert {"sampling"} < set(said)
    (out / "mine.txt").write_text("mine")
    stamp = (out / "model/model.safetensors").stat().st_mtime_ns
    build(out, 0, tiny, lambda *a: pytest.fail("built again"))
    assert (out / "model/model.safetensors").stat().st_mtime_ns == stamp
    assert find(out, 1, tiny) is None
    (out / "train.jsonl").write_text("{}\n")
    assert find(out, 0, tiny) is None
    assert find(build(out, 0, tiny).folder, 0, tiny) is not None  # mended
    assert (out / "mine.txt").read_text() == "mine"
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="expected a new folder or an earlier sandbox"):
        build(tmp_path / "other", 0, tiny)
    assert os.listdir(tmp_path / "other") == ["thesis.tex"]


# Sampling and comparing


def test_samples(sandbox: Sandbox, models: Any) -> None:
    base, _, tokenizer, _ = models
    prompts = sandbox.prompts()[:4]
    state = torch.get_rng_state()
    first = sample(base, tokenizer, prompts, K=3, seed=1, max_new_tokens=12, batch_size=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert first == sample(base, tokenizer, prompts, K=3, seed=1, max_new_tokens=12, batch_size=2)
    assert first != sample(base, tokenizer, prompts, K=3, seed=2, max_new_tokens=12, batch_size=2)
    assert [len(group) for group in first] == [3] * 4
    for prompt, group in zip(prompts, first):
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        for s in group:
            assert tokenizer.decode(s.prompt_ids) == text
            whole = tokenizer.decode(s.response_ids)  # a stray special token stays in the text, where it costs reward
            assert s.text == whole.removesuffix(EOS).strip()
            assert tokenizer.eos_token_id not in s.response_ids[:-1]


def test_log_probs_are_those_of_one_forward_each(sandbox: Sandbox, models: Any) -> None:
    base, _, tokenizer, _ = models
    samples = [s for g in sample(base, tokenizer, sandbox.prompts()[:3], 2, 5, max_new_tokens=20) for s in g]
    for s, found in zip(samples, log_probs(base, samples, batch_size=4)):
        ids = torch.tensor([s.prompt_ids + s.response_ids])
        logp_TV = base(input_ids=ids).logits[0].detach().log_softmax(-1)
        at = range(len(s.prompt_ids), ids.shape[1])
        torch.testing.assert_close(found, sum(logp_TV[t - 1, ids[0, t]] for t in at), atol=1e-4, rtol=1e-5)


def test_evaluation(sandbox: Sandbox, models: Any) -> None:
    base, policy, tokenizer, _ = models
    same = evaluate(base, base, tokenizer, sandbox.prompts(), K=2)
    assert same.win_rate.value == pytest.approx(0.5)  # over all pairs of the same answers
    assert same.kl_sequence.value == same.kl_token.value == 0
    assert same.reward_before == same.reward_after
    assert same.length_before == same.length_after
    other = evaluate(base, policy, tokenizer, sandbox.prompts(), K=2)
    assert other.kl_sequence.low > 0.1  # the planted adapter changed the model
    assert other.kl_token.value == pytest.approx(other.kl_sequence.value / other.length_after.value)
    assert len(other.samples) == 3
    assert json.loads(json.dumps(other.to_json()))["questions"] == 8
    console = Console(width=110, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    show(other, console)
    shown = console.export_text()
    assert "8 held-out questions, 2 answers each" in shown
    assert f"{other.win_rate.value:.3f}  {other.win_rate.low:.3f} to {other.win_rate.high:.3f}" in shown


def test_intervals() -> None:
    x_G = torch.randn(400, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 2
    found = estimate(x_G)
    half = 1.96 * x_G.std().item() / 20
    assert found.value == pytest.approx(x_G.mean().item())
    assert found.low == pytest.approx(found.value - half, abs=0.15 * half)
    assert found.high == pytest.approx(found.value + half, abs=0.15 * half)
    ratio = estimate(x_G * 3, torch.full_like(x_G, 6.0))
    assert ratio.value == pytest.approx(found.value / 2)


def test_wins_count_ties_as_a_half() -> None:
    from po.sandbox.evaluation import _wins

    before, after = torch.tensor([[0.0, 0.5], [1, 1]]), torch.tensor([[0.5, 1.0], [1, 0]])
    assert _wins(before, after).tolist() == [0.875, 0.25]


def test_report_of_a_run(sandbox: Sandbox, models: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run = models[3].parent
    report(run, sandbox.folder)
    assert json.loads((run / "report.json").read_text())["K"] == 4
    assert "win rate against the base" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"expected an exported adapter, found none\. Make it with: po export"):
        report(run.parent, sandbox.folder)
    with pytest.raises(UserError, match=r"expected a sandbox, found no held_out\.jsonl"):
        report(run, run)


# The demo's stages


def test_a_failing_command_is_named_with_its_last_lines() -> None:
    words = [sys.executable, "-c", "import sys; print('x y'); sys.exit('no room')"]
    with pytest.raises(POError) as e:
        command(words, os.environ)
    assert "this command ended with exit code 1:" in str(e.value)
    assert sys.executable in str(e.value)
    assert str(e.value).endswith("Its last lines:\nx y\nno room\n")


def test_earlier_runs_stay(tmp_path: Path) -> None:
    assert fresh(tmp_path / "q") == tmp_path / "q"
    (tmp_path / "q").mkdir()
    (tmp_path / "q-2").mkdir()
    assert fresh(tmp_path / "q") == tmp_path / "q-3"


@pytest.mark.slow
def test_demo_elsewhere_says_where_to_run_it(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    env = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-m", "po.sandbox", "demo"], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.endswith(
        f"po: demo: expected recipes/quickstart.yaml here, in {tmp_path}. Run it from the root of a checkout of po\n"
    )
