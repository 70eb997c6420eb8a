"""Subsets, weights and uncertainty: vectors, brute force, bounds, the script."""

from __future__ import annotations

import math
import random
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from heads_support import input_from_logratios, loss_and_grad
from prep_support import ran, script, write
from tiny import make_model

from po.data.read import Record
from po.errors import UserError
from po.heads import MPOMulti
from po.prep import uncertainty
from po.prep.embed import embed
from po.prep.medoids import cost_of, distances, medoids
from po.prep.select import Negatives, Unsure, Weights
from po.prep.subsets import bottom_k, coreset, deviation_weights, k_means, lowest_of, opt_select, without_median
from po.prep.uncertainty import Most
from po.spec import Source

SOURCE = Source("in.jsonl")
# seven answers, k = 2: a published set of vectors
REWARDS = [9.0, 7.5, 7.0, 4.0, 3.5, 1.0, 2.0]
AT = [[0.0, 0.0], [1.0, 0.2], [0.9, 0.1], [-1.0, 0.5], [-1.1, 0.4], [0.2, -1.5], [0.1, -1.4]]


def test_the_vectors() -> None:
    assert bottom_k(REWARDS, 2) == (5, 6)
    assert bottom_k([0.9, 0.2, 0.5, 0.1, 0.4, 0.05], 2) == (3, 5)
    found = opt_select(REWARDS, AT, 2)
    assert found.chosen == (4, 5)
    assert found.exact
    assert found.cost == pytest.approx(3.134218, abs=1e-6)
    assert lowest_of(REWARDS, [[1, 2, 3, 4], [5, 6]]) == [4, 5]


def brute(rewards: list[float], at: list[list[float]], k: int) -> tuple[tuple[int, ...], float]:
    best = rewards.index(max(rewards))
    others = [i for i in range(len(rewards)) if i != best]
    mean = sum(rewards) / len(rewards)

    def cost(chosen: tuple[int, ...]) -> float:
        return sum(math.exp(mean - rewards[i]) * min(math.dist(at[i], at[j]) for j in chosen) for i in others)

    found = min(combinations(others, k), key=cost)
    return found, cost(found)


def problem(seed: int, n: int) -> tuple[list[float], list[list[float]]]:
    draw = random.Random(seed)
    return [draw.gauss(0, 1) for _ in range(n)], [[draw.gauss(0, 1) for _ in range(2)] for _ in range(n)]


@pytest.mark.parametrize("seed", range(12))
def test_opt_select_is_the_least_of_all_subsets_and_the_search_says_how_far_it_is(seed: int) -> None:
    rewards, at = problem(seed, 5 + seed % 5)
    k = 1 + seed % 4
    want, cost = brute(rewards, at, k)
    exact, searched = opt_select(rewards, at, k), opt_select(rewards, at, k, enumerated=0)
    assert exact.chosen == want
    assert exact.cost == pytest.approx(cost)
    assert exact.gap == 0
    assert not searched.exact
    assert searched.bound <= cost * (1 + 1e-9)
    assert cost * (1 - 1e-9) <= searched.cost <= 5 * cost  # a local optimum of single swaps
    assert searched.cost * (1 - searched.gap) == pytest.approx(searched.bound)


def test_a_search_that_ends_beside_the_best_has_a_gap_that_covers_it() -> None:
    draw, short = np.random.default_rng(0), 0
    for _ in range(150):
        at = draw.normal(size=(14, 2))
        weight_N = draw.random(14) ** 4
        least, found = (medoids(distances(at.tolist()), weight_N, 5, n) for n in (10**6, 0))
        assert found.bound <= least.cost * (1 + 1e-9)
        assert found.cost == pytest.approx(cost_of(distances(at.tolist()), weight_N, found.chosen))
        if found.cost > least.cost * (1 + 1e-9):
            short += 1
            assert found.gap >= 1 - least.cost / found.cost - 1e-9
    assert 0 < short < 30  # there are such cases, and few


def test_large_sets_come_with_a_small_certified_gap() -> None:
    rewards, at = problem(3, 64)
    found = opt_select(rewards, at, 8)
    assert not found.exact
    assert len(set(found.chosen)) == 8
    assert found.gap < 0.02


def test_coreset_takes_the_lowest_of_each_cluster() -> None:
    draw = random.Random(0)
    centers = [(0.0, 0.0), (10.0, 0.0), (0.0, 10.0)]
    at = [[5.0, 5.0]] + [[c[0] + draw.random(), c[1] + draw.random()] for c in centers for _ in range(5)]
    rewards = [9.0] + [draw.random() for _ in range(15)]
    want = [min(range(1 + 5 * c, 6 + 5 * c), key=lambda i: rewards[i]) for c in range(3)]
    for seed in (b"", b"a", b"b"):
        assert coreset(rewards, at, 3, seed) == tuple(want)
    inertia = []
    for cluster_N in (k_means(np.array(AT[1:]), 2, b""), np.array([0, 0, 1, 1, 1, 1]), np.array([0, 0, 0, 0, 1, 1])):
        parts = [np.array(AT[1:])[cluster_N == c] for c in (0, 1)]
        inertia.append(sum(((p - p.mean(0)) ** 2).sum() for p in parts))
    assert inertia[0] == pytest.approx(min(inertia))
    assert coreset([3.0, 2.0, 1.0, 0.0], [[0.0]] * 4, 2) == (2, 3)  # equal embeddings: the lowest rewards


def test_bottom_k_and_its_ties() -> None:
    assert bottom_k([1.0, 1.0, 1.0, 1.0], 2) == (1, 2)
    for k in (0, 4):
        with pytest.raises(ValueError, match="expected 1 to one less"):
            bottom_k([1.0, 2.0, 3.0, 4.0], k)


@pytest.mark.parametrize(("power", "signed"), [(0, False), (1, False), (1, True), (2, False)])
def test_the_weights_that_are_written_are_those_of_the_head(power: Any, signed: bool) -> None:
    rewards, logratios = [4.0, 1.0, 2.0, 2.5], [0.3, -0.2, 0.1, -0.4]
    weights = deviation_weights(rewards, 0.5, power, signed)
    each = [w * math.exp(0.1 * u) for w, u in zip(weights, logratios)]
    want = -math.log(sum(e for e, r in zip(each, rewards) if r > sum(rewards) / 4) / sum(each))
    loss_G, _ = loss_and_grad(MPOMulti(0.1, 0.5, power, signed), input_from_logratios([logratios], [rewards]))
    assert want == pytest.approx(float(loss_G))


def test_weights_by_hand() -> None:
    assert deviation_weights([3.0, 1.0], 1.0) == pytest.approx([math.e, math.e])
    assert deviation_weights([3.0, 1.0], 2.0, signed=True) == pytest.approx([math.exp(2), math.exp(-2)])
    assert deviation_weights([30.0, 10.0], 1.0, standardize=True) == pytest.approx([math.e, math.e])
    assert deviation_weights([5.0, 5.0], standardize=True) == [1, 1]
    assert deviation_weights([1e9, 0.0], power=0) == [1, 1]
    with pytest.raises(ValueError, match="standardise"):
        deviation_weights([1e9, 0.0])
    assert without_median([5.0, 1.0, 3.0]) == (0, 1)
    assert without_median([5.0, 1.0, 3.0, 4.0]) == (0, 1, 3)


def test_uncertainty_by_hand() -> None:
    assert uncertainty.margin([1.0, 4.0, 3.5]) == -0.5
    assert uncertainty.entropy([2.0, 2.0]) == pytest.approx(math.log(2))
    p = 1 / (1 + math.exp(-1.5))
    assert uncertainty.entropy([1.0, 0.5], 3.0) == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p))
    assert uncertainty.entropy([1e4, 0.0]) == 0
    # three scorers of two answers; by the mean the second leads by 1 on average
    scores = [[0.0, 3.0], [0.0, 1.0], [1.0, 0.0]]
    assert uncertainty.spread(scores) == pytest.approx(math.sqrt(((3 - 1) ** 2 + 0 + (-1 - 1) ** 2) / 3))
    assert uncertainty.disagreement(scores) == pytest.approx(1 / 3)
    assert uncertainty.disagreement([[1.0, 0.0], [1.0, 1.0]]) == 0.25


@pytest.mark.parametrize("seed", range(5))
def test_the_most_uncertain_of_a_stream_are_those_of_a_sort(seed: int) -> None:
    draw = random.Random(seed)
    stream = [(float(draw.randrange(5)), str(i).encode()) for i in range(40)]
    found = Most(7)
    for value, drawn in stream:
        found.add(value, drawn)
    assert sorted(x for x in stream if x >= found.least) == sorted(stream)[-7:]
    few = Most(50)
    few.add(1.0, b"x")
    assert few.least <= (-9.0, b"")


def scored(name: str, rewards: list[float], at: list[list[float]] | None = None) -> dict[str, Any]:
    answers: list[dict[str, Any]] = [{"content": f"w{k} w{k + 1}", "reward": r} for k, r in enumerate(rewards)]
    for answer, one in zip(answers, at or []):
        answer["embedding"] = one
    return {"id": name, "prompt": name, "responses": answers}


ROWS = [scored("a", REWARDS, AT), scored("flat", [1.0, 1.0, 1.0], AT[:3]), scored("few", [1.0, 2.0], AT[:2])]


def test_the_script_keeps_the_best_and_the_chosen_and_prints_the_gap(tmp_path: Path, capsys: Any) -> None:
    argv = ("negatives", "--", "--rule", "opt_select", "-k", "2")
    rows, report = ran("subset", *argv, output=tmp_path / "o.jsonl", rows=ROWS)
    assert [a["reward"] for a in rows[0]["responses"]] == [9.0, 3.5, 1.0]
    said = rows[0]["selection"]
    assert (said["kept"], said["of"], said["exact"], said["gap"]) == ([0, 4, 5], 7, True, 0)
    assert report["dropped"] == {"equal rewards": 1, "fewer than 2 other answers": 1}
    assert "chosen exactly (every subset tried)" in capsys.readouterr().out
    rows, report = ran("subset", *argv, "--enumerated", "0", output=tmp_path / "s.jsonl", rows=ROWS)
    assert not rows[0]["selection"]["exact"]
    assert report["sums"]["chosen by local search, no gap"] == 1


def test_embeddings_come_from_a_model_where_one_is_named(tmp_path: Path) -> None:
    net = make_model(tmp_path / "net")
    with torch.inference_mode():
        from transformers import AutoModel, AutoTokenizer

        tokenizer, model = AutoTokenizer.from_pretrained(net), AutoModel.from_pretrained(net, dtype=torch.float32)
        ids = tokenizer("w3 w1 w4", return_tensors="pt")["input_ids"]
        want_D = model(ids).last_hidden_state[0].mean(0)
    alone, beside = embed(["w3 w1 w4"], str(net)), embed(["w9", "w3 w1 w4"], str(net))
    assert alone[0] == pytest.approx(want_D.tolist())
    assert alone[0] == beside[1]
    row = scored("a", [3.0, 2.0, 1.0, 0.0])
    out = Negatives(SOURCE, "coreset", 2, str(net))(Record("w", row)).rows[0]
    assert out["responses"][0]["reward"] == 3.0
    assert len(out["responses"]) == 3
    problem_ = Negatives(SOURCE, "coreset", 2)(Record("w", row)).problem
    assert "no embedding on every answer" in str(problem_)
    with pytest.raises(UserError, match="no folder of a model"):
        embed(["x"], str(tmp_path))


def test_the_script_writes_weights_and_leaves_the_median_out(tmp_path: Path) -> None:
    rows, _ = ran(
        "subset", "weights", "--", "--drop-median", output=tmp_path / "o.jsonl", rows=[scored("a", [5, 1, 3])]
    )
    assert [(a["reward"], a["weight"]) for a in rows[0]["responses"]] == [(5, math.exp(2)), (1, math.exp(2))]
    far = Weights(SOURCE)(Record("w", scored("a", [1e6, 0.0])))
    assert "standardise" in str(far.problem)


def test_the_script_keeps_the_least_sure_rows(tmp_path: Path) -> None:
    many = [scored(f"r{i}", [float(i), 0.0]) for i in (3, 1, 4, 2, 5, 1)]
    for k, row in enumerate(many):
        row["id"] = f"{k}"
    rows, report = ran("subset", "unsure", "--", "--budget", "3", output=tmp_path / "o.jsonl", rows=many)
    assert [(r["id"], r["uncertainty"]) for r in rows] == [("1", -1.0), ("3", -2.0), ("5", -1.0)]
    assert report["dropped"] == {"surer than those that were chosen": 3}


def test_several_scorers_stand_in_a_list_or_by_name() -> None:
    row = scored("a", [1.0, 0.0])
    for answer, by in zip(row["responses"], ({"x": 3, "y": 1}, {"y": 2, "x": 0})):
        answer["scores"] = by
    assert Unsure(SOURCE, "disagreement")(Record("w", row)).rows[0]["uncertainty"] == 0.5
    assert Unsure(SOURCE, "spread")(Record("w", row)).rows[0]["uncertainty"] == 2.0
    row["responses"][1]["scores"] = [1, 2, 3]
    assert "as many scores on each answer" in str(Unsure(SOURCE, "spread")(Record("w", row)).problem)
    row["responses"][1]["scores"] = ["high"]
    assert "responses[1].scores: expected finite numbers" in str(Unsure(SOURCE, "spread")(Record("w", row)).problem)


def test_same_bytes_whatever_the_processes(tmp_path: Path) -> None:
    rows = [scored(f"r{i}", *problem(i, 6)) for i in range(200)]
    source = write(tmp_path / "in.jsonl", rows)
    for processes in ("1", "2"):
        argv = [source, "-o", str(tmp_path / f"{processes}.jsonl"), "--rule", "coreset", "-k", "2"]
        script("subset").main(["negatives", *argv, "--num-proc", processes])
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "2.jsonl").read_bytes()
