"""Likra: two adapters of one base judge multiple-choice questions; equal ones judge nothing, others are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from peft import PeftModel
from test_reference import disturb
from transformers import AutoModelForCausalLM

from po.data.rows import Example
from po.errors import UserError
from po.likra import Likra, _chunks, evaluate, right_answer, wilson
from po.policy import load_policy, load_tokenizer
from po.recipe import load, resolved_text


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PO_CACHE", str(tmp_path / "po-cache"))


Make = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> Make:
    """A finished run folder of SFT with an adapter, trained in as far as a seed tells."""

    def make(name: str, seed: int, base: str = "base", **changes: object) -> Path:
        net = tmp_path / base
        if not net.exists():
            tiny.make_model(net, seed=len(base))
        run, rows = tmp_path / name, tiny.write_pairs(tmp_path / "train.jsonl", 4)
        run.mkdir()
        said = {"loss": [{"head": "sft"}], "reference": "none"} | changes
        recipe, _ = load(tiny.write_recipe(tmp_path / f"{name}.yaml", net, rows, run, **said), ())
        (run / "recipe.resolved.yaml").write_text(resolved_text(recipe))
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            policy = load_policy(recipe.model, recipe.lora)
            disturb(policy)
        policy.save_pretrained(run)
        load_tokenizer(recipe.model).save_pretrained(run)
        return run

    return make


def write_questions(path: Path, n: int = 12) -> tuple[Path, list[int]]:
    """n questions of 2 to 4 answers, and which is right."""
    rows, right = [], []
    for i in range(n):
        K = 2 + i % 3
        right.append(i % K)
        answers = [f"w{7 * i + k} w{k + i}" + " w5" * (k % 2) for k in range(K)]
        rewards = [float(k == i % K) for k in range(K)]
        rows.append({"id": str(i), "prompt": f"w{i} w{i + 3} ", "responses": answers, "rewards": rewards})
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path, right


def by_hand(net: torch.nn.Module, tokenizer: object, rows: Path) -> list[list[float]]:
    """Summed log-probs of each answer (and EOS), one plain forward each."""
    found = []
    for row in map(json.loads, rows.read_text().splitlines()):
        prompt = tokenizer(row["prompt"])["input_ids"]
        sums = []
        for answer in row["responses"]:
            ids = [*prompt, *tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            with torch.no_grad():
                log_LV = net(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
            sums.append(sum(float(log_LV[t - 1, ids[t]]) for t in range(len(prompt), len(ids))))
        found.append(sums)
    return found


def correct(plus: list[list[float]], minus: list[list[float]] | None, right: list[int]) -> float:
    hits = 0
    for i, k in enumerate(right):
        scores = plus[i] if minus is None else [a - b for a, b in zip(plus[i], minus[i], strict=True)]
        hits += scores.index(max(scores)) == k
    return hits / len(right)


def values(result: Likra) -> dict[str, float]:
    return {a.name: a.value for a in result.accuracies}


@pytest.mark.parametrize("share_prefix", ["auto", False])
def test_accuracies_are_those_of_plain_forwards(make_run: Make, tmp_path: Path, share_prefix: object) -> None:
    model = {"name_or_path": str(tmp_path / "base"), "dtype": "float32", "share_prefix": share_prefix}
    runs = [make_run(name, seed, model=model) for seed, name in enumerate(("pos", "neg"))]
    rows, right = write_questions(tmp_path / "questions.jsonl")
    result = evaluate(*runs, str(rows))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    tokenizer = load_tokenizer(load(tmp_path / "pos.yaml", ())[0].model)
    plain = by_hand(base, tokenizer, rows)
    pos, neg = (
        by_hand(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), r), tokenizer, rows)
        for r in runs
    )
    assert values(result) == {
        "base": correct(plain, None, right),
        "positive": correct(pos, None, right),
        "base - negative": correct(plain, neg, right),
        "positive - negative": correct(pos, neg, right),
    }
    assert len(set(values(result).values())) > 1
    assert result.questions == 12
    assert result.chance == pytest.approx((1 / 2 + 1 / 3 + 1 / 4) / 3)


def test_identical_adapters_judge_nothing(make_run: Make, tmp_path: Path) -> None:
    """All scores are 0, so all answers tie: what guessing gives."""
    runs = [make_run(name, 0) for name in ("pos", "neg")]
    rows, _ = write_questions(tmp_path / "questions.jsonl")
    result = evaluate(*runs, str(rows))
    ratio = result.accuracies[-1]
    assert ratio.name == "positive - negative"
    assert ratio.value == pytest.approx(result.chance)
    assert ratio.low < ratio.value < ratio.high
    lines = result.table().splitlines()
    assert lines[0].split() == ["score", "correct", "95", "%", "interval"]
    assert lines[4].startswith("positive - negative    36.1%")
    assert lines[-1] == "12 questions; guessing gets 36.1%"


def test_other_bases_and_whole_models_are_refused(make_run: Make, tmp_path: Path) -> None:
    rows, _ = write_questions(tmp_path / "questions.jsonl")
    pos, other, whole = make_run("pos", 0), make_run("other", 0, base="another"), make_run("whole", 0, lora=None)
    with pytest.raises(UserError, match=r"other: its base '.*another' has other weights than '.*base', the base of"):
        evaluate(pos, other, str(rows))
    with pytest.raises(UserError, match="whole: this run trained all weights; expected one that trained an adapter"):
        evaluate(pos, whole, str(rows))
    with pytest.raises(UserError, match=r"is not a run folder \(no recipe.resolved.yaml in it\)"):
        evaluate(pos, tmp_path / "base", str(rows))


def test_another_tokenizer_is_refused(make_run: Make, tmp_path: Path) -> None:
    rows, _ = write_questions(tmp_path / "questions.jsonl")
    pos, neg = make_run("pos", 0), make_run("neg", 1)
    config = json.loads((neg / "tokenizer_config.json").read_text())
    template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    (neg / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    with pytest.raises(UserError, match=r"neg: its tokenizer or chat template differs from that of .*pos"):
        evaluate(pos, neg, str(rows))


def test_an_answer_that_would_be_dropped_stops_the_evaluation(make_run: Make, tmp_path: Path) -> None:
    rows = tmp_path / "questions.jsonl"
    rows.write_text(json.dumps({"prompt": "w1 ", "responses": ["w2", "w2 ", "w3"], "rewards": [0, 1, 0]}) + "\n")
    with pytest.raises(UserError, match=r"all must stay(.|\n)*responses\[1\] became identical to"):
        evaluate(make_run("pos", 0), make_run("neg", 1), str(rows))


def example(K: int, **fields: object) -> Example:
    return Example("1", "q.jsonl:1", (1,), ((2,),) * K, **fields)  # type: ignore[arg-type]


def test_the_right_answer() -> None:
    assert right_answer(example(3, reward=(0.0, 2.0, 1.0))) == 1
    assert right_answer(example(3, label=(-1, -1, 1))) == 2
    assert right_answer(example(2, label=(1, -1), chosen_first=True)) == 0
    assert right_answer(example(2, label=(1, -1), reward=(0.0, 1.0), chosen_first=True)) == 0
    for bad in ({"reward": (1.0, 0.0, 1.0)}, {}, {"label": (1, 1, -1)}):
        with pytest.raises(UserError, match=r"q\.jsonl:1: the answers marked as right are"):
            right_answer(example(3, **bad))


def test_chunks_keep_order_and_room() -> None:
    examples = [Example(str(i), "", (0,) * p, ((1,) * 2,) * 3) for i, p in enumerate((4, 4, 50, 1, 1))]
    for shared, want in ((True, [["0", "1"], ["2"], ["3", "4"]]), (False, [["0"], ["1"], ["2"], ["3", "4"]])):
        assert [[e.id for e in chunk] for chunk in _chunks(examples, shared, 20)] == want


def test_intervals() -> None:
    """Wilson 1927; the second by the closed form z^2 / (n + z^2) of no hits."""
    assert wilson(8, 10) == pytest.approx((0.490162, 0.943318), abs=1e-6)
    assert wilson(0, 10) == pytest.approx((0.0, 3.841459 / 13.841459), abs=1e-6)
    assert wilson(10, 10) == pytest.approx((10 / 13.841459, 1.0), abs=1e-6)
