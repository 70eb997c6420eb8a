"""The benchmark on the sandbox: rows for every head, runs that resume, a table that says what was run."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import objectives  # noqa: E402
from claims import CLAIMS, Lab  # noqa: E402
from harness import plan  # noqa: E402
from harness.derive import above_mean, derive, kind_of_rows  # noqa: E402
from harness.plan import Spec, unfed  # noqa: E402
from harness.runs import Training, fit, moved  # noqa: E402
from harness.stats import interval, verdict  # noqa: E402
from harness.table import frontier, markdown  # noqa: E402
from harness.world import World  # noqa: E402

from po.heads import HEADS  # noqa: E402
from po.load import load_data  # noqa: E402
from po.recipe import load  # noqa: E402
from po.sandbox import Pretraining, Size, build, reward  # noqa: E402
from po.sandbox import world as questions  # noqa: E402
from po.sandbox.questions import Question, demonstration  # noqa: E402

MICRO = Size(
    train=40,
    eval=8,
    held_out=6,
    responses=3,
    pretraining=Pretraining(hidden_size=32, intermediate_size=64, layers=2, heads=2, vocab_size=400, steps=60, batch=8),
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A sandbox whose answers are those of the corpus's authors: a model this small knows none that earn a reward."""
    folder = tmp_path_factory.mktemp("sandbox") / "s"
    found, rng = build(folder, 3, MICRO), random.Random(0)
    this = questions(3, MICRO.train, MICRO.eval, MICRO.held_out)
    for path, asked in ((found.train, this.train), (found.eval, this.eval)):
        said = [{"id": f"{i}", "prompt": q.messages, "responses": _answers(q, rng)} for i, q in enumerate(asked)]
        path.write_text("".join(json.dumps(row) + "\n" for row in said))
    return World(folder, found.key)


def _answers(question: Question, rng: random.Random) -> list[dict[str, Any]]:
    texts = [demonstration(question, rng) for _ in range(4)]
    return [{"content": t, "reward": reward(question.text, t)} for t in texts]


@pytest.fixture(scope="module", autouse=True)
def setting(world: World, tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PO_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(objectives, "environment", lambda cache: None)
        patch.setattr(objectives, "open_world", lambda folder: world)
        yield


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def made(world: World, kind: str, folder: Path) -> list[dict[str, Any]]:
    return rows(derive(world, kind, folder / f"{kind}.jsonl", world.train, world.model))


def labels(row: dict[str, Any]) -> list[bool | None]:
    return [a["label"] for a in row["responses"]]


def test_labels_follow_the_rewards(world: World, tmp_path: Path) -> None:
    for row in made(world, "labelled", tmp_path):
        score = [reward(row["prompt"], a["content"]) for a in row["responses"]]
        mean = sum(a["reward"] for a in row["responses"]) / len(score)
        assert [s > mean for s in score] == labels(row)
        assert {True, False} == set(labels(row)), "a row whose answers are all alike teaches nothing and is left out"
    for i, row in enumerate(made(world, "ends", tmp_path)):
        score = [a["reward"] for a in row["responses"]]
        assert labels(row).count(True) == labels(row).count(False) == 1, i
        assert score[labels(row).index(True)] == max(score)
        assert score[labels(row).index(False)] == min(score)
    known = [set(labels(r)) != {None} for r in made(world, "few", tmp_path)]
    assert 0 < sum(known) <= len(known) / 3


def test_a_copy_has_words_struck_out(world: World, tmp_path: Path) -> None:
    for row in made(world, "degrees", tmp_path):
        assert labels(row) == [True, False, None]
        best, _, copy = (a["content"].rstrip(".").split() for a in row["responses"])
        assert row["removed"] in (1, 2, 3)
        assert len(copy) == max(1, len(best) - len(best) * int(row["removed"]) // 4)


@pytest.mark.parametrize("name", sorted(HEADS))
def test_every_head_is_fed(name: str, world: World, tmp_path_factory: pytest.TempPathFactory) -> None:
    """po itself reads the rows, and its check of what the head needs accepts them."""
    if reason := unfed(name):
        pytest.skip(reason)
    folder = tmp_path_factory.getbasetemp() / "fed"
    spec = Spec(name, 0.1, 0, 2, 1e-3)
    derive(world, spec.kind, folder / "rows" / f"{spec.kind}.jsonl", world.train, world.model)
    (folder / "recipe.yaml").write_text(
        yaml.safe_dump(objectives.training(spec, folder).recipe(world.folder / "model", folder))
    )
    recipe, _ = load(folder / "recipe.yaml")
    data = load_data(recipe, world.tokenizer)
    assert len(data.train) > 10


def test_families_name_heads_that_are_there() -> None:
    """Each once, and every head that is fed."""
    named = [name for names in plan.FAMILIES.values() for name in names]
    assert sorted(named) == [name for name in sorted(HEADS) if unfed(name) is None]


def test_what_is_left_out_has_a_reason() -> None:
    assert unfed("grpo") is None
    assert unfed("sdft") == "no prompt of the sandbox knows more than another"
    assert unfed("xpo") == "no way to derive its column 'from_reference' from scored answers"
    assert unfed("grpo2") == "compares exactly two answers, and the sandbox's sets have more"


def test_strengths() -> None:
    assert Spec("dpo", 0.3, 0, 2, 1e-3).term() == {"head": "dpo", "beta": 0.3}
    assert Spec("ipo", 0.3, 0, 2, 1e-3).term() == {"head": "ipo", "tau": 0.3}
    assert Spec("simpo", 0.3, 0, 2, 1e-3).term()["beta"] == pytest.approx(6.0), "its default 2 stands for DPO's 0.1"
    assert Spec("infonca", 0.3, 0, 2, 1e-3).term()["beta"] == 0.3, "small defaults are for long answers"
    weak, strong = (Spec("sft", b, 0, 2, 1e-3) for b in (0.1, 0.4))
    assert (weak.term(), weak.rate(), strong.rate()) == ({"head": "sft"}, 1e-3, 2.5e-4)
    assert len({Spec("dpo", b, s, 2, 1e-3).key("w") for b in (0.1, 0.2) for s in (0, 1)}) == 4


@pytest.mark.slow
def test_runs_resume(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--heads", "dpo,sft", "--betas", "0.1", "--seeds", "1", "--steps", "2"]
    words += ["--out", str(tmp_path), "--sandbox", str(world.folder)]
    assert objectives.main(words) == 0
    first = rows(tmp_path / "runs.jsonl")
    assert [(r["head"], r["seed"]) for r in first] == [("dpo", 0), ("sft", 0)]
    assert all(0 <= r["reward"] <= 1 and r["kl"] == r["kl"] for r in first)

    text = (tmp_path / "runs.jsonl").read_text()
    (tmp_path / "runs.jsonl").write_text(text[:-40])  # an interruption within the last line
    assert objectives.main(words) == 0
    assert "2 runs, 1 of them done before" in capsys.readouterr().out
    again = {r["key"]: r for r in objectives.read(tmp_path / "runs.jsonl")}
    seconds = {"seconds": 0}
    assert [again[r["key"]] | seconds for r in first] == [r | seconds for r in first], "the same seed, the same run"
    assert "| dpo | beta 0.1 |" in (tmp_path / "frontier.md").read_text()


def test_a_failure_is_told_and_tried_again(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--heads", "dpo", "--betas", "0.1", "--seeds", "1", "--steps", "2"]
    words += ["--out", str(tmp_path), "--sandbox", str(world.folder)]

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(objectives, "fit", broken)
        objectives.main(words)
    assert "- dpo at 0.1: RuntimeError: out of luck" in (tmp_path / "frontier.md").read_text()
    objectives.main(words)
    assert "out of luck" not in (tmp_path / "frontier.md").read_text()


def test_table_and_intervals() -> None:
    """Student's t over seeds: 2 and 4 give 3 +- 12.706 * sqrt(2) / sqrt(2)."""
    found = interval([2.0, 4.0])
    assert (found.mean, found.half) == (3.0, pytest.approx(12.706))
    assert interval([1.0], 0.5).half == pytest.approx(0.98)
    assert verdict(interval([1.0, 1.1, 0.9])) == "holds"
    assert verdict(interval([-1.0, -1.1, -0.9])).endswith("the opposite")
    assert verdict(interval([-1.0, 1.1, 0.9])).endswith("beyond chance")
    known = dict.fromkeys(("kl", "exact", "length", "best", "worst"), 1.0)
    lines = [
        {"head": h, "beta": b, "seed": s, "term": {"head": h}, "learning_rate": 1e-3, "reward": 0.5 + 0.1 * s, **known}
        for s in (0, 1, 2)
        for h, b in (("sft", 0.1), ("dpo", 0.3), ("dpo", 0.1))
        if s < 2 or h == "dpo"
    ]
    lines = [line | {"reward_se": 0.1} for line in lines]
    points, failed = frontier([*lines, {"head": "nca", "beta": 0.1, "seed": 0, "error": "NumericsError: NaN"}])
    assert [(p.head, p.beta, p.seeds) for p in points] == [("dpo", 0.1, 3), ("dpo", 0.3, 3), ("sft", 0.1, 2)]
    text = markdown(points, failed, {"x": "no rows"}, {"reward": 0.4})
    assert "| 3 | 0.600 ± 0.248 |" in text
    assert "| 2 | 0.550 ± 0.196 |" in text  # t over two seeds is no use: over questions
    assert "- nca at 0.1: NumericsError: NaN" in text
    assert "- x: no rows" in text


def test_the_policy_that_is_measured_is_the_trained_one(world: World, tmp_path: Path) -> None:
    """SFT on one answer makes that answer likelier, and the base stays as it was."""
    path = derive(world, "scored", tmp_path / "scored.jsonl", world.train)
    before = moved(world, world.model)
    trained = fit(world, Training(({"head": "sft"},), path, steps=8))
    assert before == {"best": 0.0, "worst": 0.0} == moved(world, world.model)
    assert moved(world, trained.plain)["best"] > 0.1


def test_above_mean_is_strict() -> None:
    row = {"responses": [{"reward": r} for r in (0.5, 0.5, 0.5)]}
    assert above_mean(row) == [False] * 3


def test_kinds_of_rows() -> None:
    kinds = {h: kind_of_rows(h, HEADS[h].needs) for h in ("dpo", "nca", "sft", "adpa")}
    assert kinds == {"dpo": "scored", "nca": "scored", "sft": "scored", "adpa": "taught"}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(HEADS))
def test_every_head_trains(name: str, world: World, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp() / "trains"
    spec = Spec(name, 0.1, 0, 3, 1e-3)
    objectives._prepare({spec.kind}, world, folder)
    found = objectives.one((spec, world.folder, folder))
    assert "error" not in found, found


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(CLAIMS))
def test_every_claim_runs(name: str, world: World, tmp_path: Path) -> None:
    found = CLAIMS[name](Lab(world, tmp_path, share=0.05), seeds=(0, 1))
    assert found.rows
    assert found.verdicts
    assert all(len(row) == len(found.header) for row in found.rows)
