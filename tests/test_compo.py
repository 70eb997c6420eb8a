"""ComPO: a step in numbers, the oracle against whole forwards, and the command on tiny models, killed and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_likra import by_hand
from test_reference import disturb
from tiny_models import Float64
from tiny_models import tiny as tiny_family
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from po import compo_run
from po.batch import Group
from po.compo import ComPO, Oracle, direction, estimate, seed_of, update
from po.compo_run import oracle, run
from po.data.rows import Example, Item
from po.errors import UserError
from po.logprob import install
from po.policy import load_policy, load_tokenizer
from po.recipe import load, resolved_text
from po.scores import Shape

FEW = ComPO(directions=48, lambda_g=0.001)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PO_CACHE", str(tmp_path / "po-cache"))


def make(tmp_path: Path, config: dict[str, Any] | None = None, n: int = 24, **changes: object) -> Path:
    net = tiny.make_model(tmp_path / "net", **(config or {}))
    rows = tiny.write_pairs(tmp_path / "pairs.jsonl", n)
    return tiny.write_recipe(tmp_path / "recipe.yaml", net, rows, tmp_path / "run", **changes)


# One step


def test_a_step_in_numbers() -> None:
    """By hand, from y = -1, +1, -1."""
    z = torch.tensor([[0.6, 0.8, 0.0], [0.0, 0.6, -0.8], [0.28, 0.0, 0.96]], dtype=torch.float64)
    total = torch.tensor([-1.0, 1.0, -1.0], dtype=torch.float64) @ z
    step = update(total.clone(), 2 / 3, lambda_g=0.3, threshold=0.2, gamma=1.0)
    assert step.update is not None
    want = torch.tensor([0.296614, 0.0, 0.593228], dtype=torch.float64)
    torch.testing.assert_close(step.update, want, rtol=0, atol=1e-6)
    assert step.kept == pytest.approx(2 / 3)
    plain = update(total.clone(), 2 / 3, lambda_g=0.0, threshold=0.2, gamma=1.5).update
    want = torch.tensor([0.444921, 0.101118, 0.889843], dtype=torch.float64)
    torch.testing.assert_close(plain, want, rtol=0, atol=1e-6)
    assert update(total.clone(), 0.2, 0.3, threshold=0.2, gamma=1.0).update is None  # not more than lambda
    nothing = update(torch.zeros(3), 0.5, 0.3, 0.2, 1.0)
    assert nothing.update is not None
    assert nothing.update.tolist() == [0, 0, 0]


@pytest.mark.parametrize("sampling", ["sphere", "gaussian"])
def test_an_estimate_adds_up_its_directions(sampling: Any) -> None:
    theta = torch.zeros(30, 20)
    seen: list[Tensor] = []

    def better(z: Tensor, radius: float) -> bool:
        assert radius == 0.5
        seen.append(z.clone())
        return bool(z[0, 0] > 0)

    step = estimate(theta, better, ComPO(radius=0.5, directions=7, lambda_g=0.0, threshold=0.0, sampling=sampling), "a")
    y = [-1 if z[0, 0] > 0 else 1 for z in seen]
    total = sum((z * sign for z, sign in zip(seen, y, strict=True)), torch.zeros(30, 20))
    assert step.share == y.count(-1) / 7
    assert 0 < step.share < 1
    assert step.update is not None
    torch.testing.assert_close(step.update, -step.share * total / total.norm())
    assert len({float(z[0, 0]) for z in seen}) == 7
    norm = 1.0 if sampling == "sphere" else 600**0.5
    assert all(float(z.norm()) == pytest.approx(norm, rel=1e-5 if sampling == "sphere" else 0.15) for z in seen)


def test_the_two_samplings_differ_in_length_alone() -> None:
    like = torch.zeros(5, 4)
    ball, cloud = direction(like, seed_of(1, 2), "sphere"), direction(like, seed_of(1, 2), "gaussian")
    torch.testing.assert_close(ball, cloud / cloud.norm())
    assert not torch.equal(ball, direction(like, seed_of(1, 3), "sphere"))


# The oracle


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "cohere", "phi"])
def test_changes_are_those_of_two_whole_forwards(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cap on the logits, scales and a bias; more tokens than are compared at once."""
    monkeypatch.setattr("po.compo._ROWS", 3)
    net = tiny_family(family).eval().requires_grad_(False)
    head = net.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)  # its own copy
    if family == "gemma2":
        net.config.final_logit_softcapping = 2.0
    install(net)
    pair = ((5, 6, 7), ((8, 9, 10, 11, 2), (12, 13)))
    theta = head.weight.clone()
    delta = 0.3 * torch.randn(theta.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def logps() -> list[float]:
        found = []
        for response in pair[1]:
            logits = net(input_ids=torch.tensor([[*pair[0], *response]])).logits[0].log_softmax(-1)
            found.append(sum(float(logits[len(pair[0]) - 1 + t, token]) for t, token in enumerate(response)))
        return found

    with Float64():
        monkeypatch.setattr(Tensor, "float", Tensor.double)  # the oracle in float64 too
        judge = oracle(net, Group(Example("1", "x:1", *pair), Item(0, (0, 1))), theta)
        before = logps()
        head.weight.copy_(theta + 0.5 * delta)
        want = [b - a for a, b in zip(before, logps(), strict=True)]
    assert max(map(abs, want)) > 0.01
    assert judge.changes(delta, 0.5) == pytest.approx(want, abs=1e-9)
    assert judge.better(delta, 0.5) == (want[0] > 0 > want[1])


def test_small_changes_are_not_lost_in_fp32() -> None:
    g = torch.Generator().manual_seed(0)
    h, theta = torch.randn(6, 8, generator=g), torch.randn(50, 8, generator=g)
    delta = 1e-9 * torch.randn(50, 8, generator=g)
    target, worse = torch.arange(6), torch.tensor([False] * 3 + [True] * 3)
    low = Oracle(h, target, worse, theta, None, Shape()).changes(delta)
    high = Oracle(h.double(), target, worse, theta.double(), None, Shape()).changes(delta.double())
    assert low == pytest.approx(high, rel=1e-3)
    assert 0 < abs(high[0]) < 1e-7


# The command


def margins(folder: Path, rows: list[dict[str, str]], tmp_path: Path) -> list[tuple[float, float]]:
    """(log pi(chosen), log pi(rejected)) under a model as transformers loads it."""
    net, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r | {"responses": [r["chosen"], r["rejected"]]}) + "\n" for r in rows))
    return [(a, b) for a, b in by_hand(net.eval(), AutoTokenizer.from_pretrained(folder), path)]


@pytest.mark.parametrize("tied", [False, True])
def test_noisy_pairs_are_raised(tmp_path: Path, tied: bool) -> None:
    recipe = make(tmp_path, {"tie_word_embeddings": tied})
    report = run(str(recipe), None, tmp_path / "out", FEW)
    found = json.loads((tmp_path / "out" / "compo.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    start = margins(tmp_path / "net", rows, tmp_path)
    noisy = [i for i, (w, l) in enumerate(start) if abs(w - l) <= 3.0]  # noqa: E741
    assert [one["row"] for one in found["log"]] == [f"pairs.jsonl:{i + 1}" for i in noisy]
    assert (found["pairs"], found["noisy"]) == (24, len(noisy))
    assert report.startswith(f"24 pairs: {24 - len(noisy)} clean, {len(noisy)} noisy (")
    end = margins(tmp_path / "out", rows, tmp_path)
    up = sum(end[i][0] - start[i][0] for i in noisy) / len(noisy)
    down = sum(end[i][1] - start[i][1] for i in noisy) / len(noisy)
    assert up > 0 > down
    assert (found["chosen"], found["rejected"]) == pytest.approx((up, down), abs=1e-4)
    assert any(one["applied"] for one in found["log"])
    assert ("the output layer shared its weight with the embedding" in report) is tied
    old, new = (AutoModelForCausalLM.from_pretrained(tmp_path / f).state_dict() for f in ("net", "out"))
    assert [k for k in old if not torch.equal(old[k], new[k])] == ["lm_head.weight"]


def test_the_policy_is_a_finished_run_with_an_adapter(tmp_path: Path) -> None:
    path = make(tmp_path)
    recipe, _ = load(path, ())
    policy = load_policy(recipe.model, recipe.lora)
    disturb(policy)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.resolved.yaml").write_text(resolved_text(recipe))
    policy.save_pretrained(tmp_path / "run")
    load_tokenizer(recipe.model).save_pretrained(tmp_path / "run")
    run(str(path), tmp_path / "run", tmp_path / "out", ComPO(directions=8, threshold=0.99))
    assert not any(one["applied"] for one in json.loads((tmp_path / "out" / "compo.json").read_text())["log"])
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(saved(ids).logits, policy.eval()(ids).logits, rtol=0, atol=1e-4)


def test_a_killed_command_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = str(make(tmp_path))
    run(recipe, None, tmp_path / "whole", FEW)
    calls: list[object] = []

    def dies(theta: Tensor, better: Any, how: ComPO, seed: object) -> Any:
        calls.append(seed)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return estimate(theta, better, how, seed)

    monkeypatch.setattr(compo_run, "_SAVE_AFTER", 0.0)
    monkeypatch.setattr(compo_run, "estimate", dies)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, None, tmp_path / "killed", FEW)
    with pytest.raises(UserError, match=r"killed holds the progress of another command \(other settings, seed, rows"):
        run(recipe, None, tmp_path / "killed", ComPO(directions=47, lambda_g=0.001))
    run(recipe, None, tmp_path / "killed", FEW)
    assert calls[:4] == [(42, 0), (42, 1), (42, 2), (42, 2)]  # the third pair again, none before it
    files = [{p.name: p.read_bytes() for p in (tmp_path / f).iterdir()} for f in ("whole", "killed")]
    assert files[0] == files[1]


def test_the_split_writes_the_clean_rows(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    report = run(str(recipe), None, tmp_path / "split", ComPO(), split_only=True)
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    clean = [json.loads(line) for line in (tmp_path / "split" / "clean.jsonl").read_text().splitlines()]
    start = margins(tmp_path / "net", rows, tmp_path)
    assert clean == [r for r, (w, l) in zip(rows, start, strict=True) if abs(w - l) > 3.0]  # noqa: E741
    assert 0 < len(clean) < len(rows)
    assert report.splitlines()[1] == f"{len(clean)} clean rows of {tmp_path}/pairs.jsonl: {tmp_path}/split/clean.jsonl"
    load(recipe, (f"data.train={tmp_path}/split/clean.jsonl",))


# What is refused


def refused(recipe: Path, out: Path, how: ComPO = FEW, **more: Any) -> str:
    with pytest.raises(UserError) as e:
        run(str(recipe), more.pop("policy", None), out, how, **more)
    return str(e.value)


def test_recipes_that_cannot_be_split_are_refused(tmp_path: Path) -> None:
    simpo = {"loss": [{"head": "simpo", "beta": 2.0}], "reference": "none"}
    assert refused(make(tmp_path, **simpo), tmp_path / "out") == (
        "reference: none; ComPO splits pairs by the reference's log-probs. Write `reference: init`"
    )
    sft = make(tmp_path, loss=[{"head": "sft"}, {"head": "npo"}])
    said = refused(sft, tmp_path / "out")
    assert said == "loss: its heads train on the layout 'unpaired'; ComPO needs pairs. Use e.g. head 'dpo'"
    recipe = make(tmp_path, n=4)
    said = refused(recipe, tmp_path / "out", ComPO(noisy=1e-9))
    assert said.startswith(f"{recipe}: no pair is noisy: the least |reference margin| is ")
    assert said.endswith(". Raise --noisy")


def test_folders_in_use_and_sets_are_refused(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert refused(recipe, tmp_path / "out") == (
        f"--out: {tmp_path}/out holds 'notes.txt'; give a new folder, or that of the same command, killed"
    )
    tiny.write_sets(tmp_path / "pairs.jsonl", 6)
    assert refused(recipe, tmp_path / "split", split_only=True) == (
        "--split-only: pairs.jsonl:1 is a set, of which a pair was derived; expected rows that are pairs"
    )


def test_settings_out_of_range_are_refused() -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"radius": 0.0}, "--radius: expected a number above 0, got 0.0"),
        ({"lambda_g": -1.0}, "--lambda-g: expected from 0 to below 1, got -1.0"),
        ({"threshold": 1.0}, "--threshold: expected from 0 to below 1, got 1.0"),
        ({"noisy": float("nan")}, "--noisy: expected from 0 to below inf, got nan"),
    ]
    for settings, message in wrong:
        with pytest.raises(UserError) as e:
            ComPO(**settings)
        assert str(e.value) == message
