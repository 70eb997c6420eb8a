"""Repairs: vectors, brute force, planted faults of which a known share is found, the script."""

from __future__ import annotations

import itertools
import math
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import repair
import torch
from prep_support import ran, script, write

from po.data.formats import convert
from po.data.read import Record
from po.errors import UserError
from po.heads.sspo import SSPO
from po.prep.agreement import Found, kendall_tau
from po.prep.comparisons import Complete, table
from po.prep.curatron import complete, connected, least_absolute, observed_logits, pursue, rank_two
from po.prep.pseudo import SAMPLED, Scores, labels, unlabelled_loss
from po.prep.relabel import ByStrength, PseudoLabel, turned
from po.prep.strength import Bands, Strength, mend, soft_label, thresholds
from po.spec import Source

SOURCE = Source("in.jsonl")


def world(seed: int, n: int, wrong: float) -> tuple[Any, Any, Any]:
    """True scores, probabilities with planted faults, and where these are."""
    draw = np.random.default_rng(seed)
    true_N = draw.normal(size=n)
    off_NN = np.triu(np.where(draw.random((n, n)) < wrong, draw.choice([-4.0, 4.0], (n, n)), 0), 1)
    logit_NN = true_N[:, None] - true_N + off_NN - off_NN.T
    return true_N, 1 / (1 + np.exp(-logit_NN)), off_NN != 0


def test_logits_of_bradley_terry_are_skew_and_of_rank_two() -> None:
    true_N, p_NN, _ = world(0, 12, 0.0)
    logit_NN, seen_NN = observed_logits(p_NN, 1e-6)
    assert np.allclose(logit_NN, -logit_NN.T)
    assert np.linalg.matrix_rank(logit_NN, tol=1e-9) == 2
    assert np.allclose(logit_NN, true_N[:, None] - true_N)
    assert seen_NN.sum() == 12 * 11


@pytest.mark.parametrize("seed", range(3))
def test_thirty_items_with_8_percent_of_4_logits_are_recovered_to_the_last_digit(seed: int) -> None:
    true_N, p_NN, planted_NN = world(seed, 30, 0.08)
    naive_N = observed_logits(p_NN, 1e-9)[0].mean(-1)
    done = complete(p_NN, "low_rank", 1e-9)
    assert kendall_tau(naive_N.tolist(), true_N.tolist()) < 0.95
    assert kendall_tau(done.score_N.tolist(), true_N.tolist()) == 1
    low_NN = np.log(done.probability_NN) - np.log1p(-done.probability_NN)
    assert np.abs(low_NN - (true_N[:, None] - true_N)).max() < 1e-4
    found = Found.of(planted_NN.ravel().tolist(), np.triu(done.corrupted_NN, 1).ravel().tolist())
    assert (found.precision, found.recall) == (1, 1)
    assert done.flipped_NN.sum() > 0
    assert not (done.flipped_NN & ~done.corrupted_NN & (np.abs(low_NN) > 1)).any()


@pytest.mark.parametrize("seed", range(6))
def test_least_absolute_deviations_are_the_best_spanning_tree(seed: int) -> None:
    """An optimum of the linear program lies where n - 1 comparisons that connect all items hold exactly."""
    draw = np.random.default_rng(seed)
    logit_NN = np.triu(draw.normal(size=(5, 5)), 1)
    logit_NN -= logit_NN.T
    edges = [(i, j) for i in range(5) for j in range(i)]
    edges = [edges[k] for k in sorted(draw.permutation(10)[:8])]
    seen_NN = np.zeros((5, 5), dtype=bool)
    for i, j in edges:
        seen_NN[i, j] = seen_NN[j, i] = True
    least = math.inf
    for tree in itertools.combinations(edges, 4):
        a = np.array([[(k == i) - (k == j) for k in range(5)] for i, j in tree])
        if np.linalg.matrix_rank(a) == 4:
            w = np.linalg.lstsq(a, np.array([logit_NN[e] for e in tree]))[0]
            least = min(least, sum(abs(logit_NN[i, j] - w[i] + w[j]) for i, j in edges))
    low_NN, _ = least_absolute(np.where(seen_NN, logit_NN, 0), seen_NN)
    assert sum(abs(logit_NN[e] - low_NN[e]) for e in edges) == pytest.approx(least, rel=1e-6)


def test_rank_two_is_the_nearest_of_its_kind() -> None:
    draw = np.random.default_rng(0)
    a_NN = draw.normal(size=(6, 6))
    near_NN = rank_two(a_NN)
    assert np.allclose(near_NN, -near_NN.T)
    assert np.linalg.matrix_rank(near_NN, tol=1e-9) == 2
    far = np.linalg.norm((a_NN - a_NN.T) / 2 - near_NN)
    for _ in range(300):  # u v' - v u' is every skew-symmetric matrix of rank 2
        u, s, _ = np.linalg.svd(near_NN)
        step = [x + 0.1 * draw.normal(size=6) for x in (u[:, 0] * s[0], u[:, 1])]
        other_NN = np.outer(step[0], step[1]) - np.outer(step[1], step[0])
        for sign in (1, -1):
            assert np.linalg.norm((a_NN - a_NN.T) / 2 - sign * other_NN) >= far


def test_what_is_missing_is_filled_and_what_cannot_be_is_refused() -> None:
    true_N, p_NN, _ = world(1, 10, 0.0)
    for k in range(8):
        p_NN[k, k + 2] = p_NN[k + 2, k] = np.nan
    for method in ("low_rank", "least_absolute"):
        done = complete(p_NN, method, 1e-9)
        assert kendall_tau(done.score_N.tolist(), true_N.tolist()) > 0.9
        assert done.filled_NN.sum() == 16
    assert np.allclose(done.probability_NN, 1 / (1 + np.exp(true_N - true_N[:, None])), atol=1e-6)
    p_NN[0], p_NN[:, 0] = np.nan, np.nan
    assert not connected(~np.isnan(p_NN))
    with pytest.raises(ValueError, match="nothing connects"):
        complete(p_NN)
    even_NN, rounds = pursue(np.zeros((3, 3)), ~np.eye(3, dtype=bool))
    assert (even_NN == 0).all()
    assert rounds == 0


def test_one_of_a_comparisons_two_directions_is_enough_and_both_are_averaged() -> None:
    p_NN = np.full((2, 2), np.nan)
    p_NN[0, 1] = 0.8
    assert observed_logits(p_NN)[0][1, 0] == pytest.approx(-math.log(4))
    p_NN[1, 0] = 0.4  # 1 - 0.4 = 0.6; the mean is 0.7
    assert observed_logits(p_NN)[0][0, 1] == pytest.approx(math.log(7 / 3))
    p_NN[0, 1], p_NN[1, 0] = 1.0, np.nan
    assert observed_logits(p_NN, 0.01)[0][0, 1] == pytest.approx(math.log(99))


def compared(n: int = 4) -> dict[str, Any]:
    each = [{"a": a, "b": b, "p": 1 / (1 + math.exp(a - b))} for a in range(n) for b in range(a + 1, n)]
    return {"id": "c", "prompt": "q", "responses": [{"content": f"r{k}"} for k in range(n)], "comparisons": each}


def test_the_script_completes_a_rows_comparisons(tmp_path: Path) -> None:
    row = compared(5)
    row["comparisons"][3]["p"] = 0.02  # 0 against 4: truly 0.98
    del row["comparisons"][-1]
    apart = {**compared(3), "id": "apart", "comparisons": [{"a": 0, "b": 1, "p": 0.5}]}
    argv = ("complete", "--", "--method", "least_absolute")
    (out,), report = ran("repair", *argv, output=tmp_path / "o.jsonl", rows=[row, apart])
    rewards = [a["reward"] for a in out["responses"]]
    assert rewards == sorted(rewards, reverse=True)
    assert rewards[0] - rewards[1] == pytest.approx(1)
    by_pair = {(c["a"], c["b"]): c for c in out["comparisons"]}
    assert len(by_pair) == 10
    assert by_pair[0, 4]["was"] == "flipped"
    assert by_pair[0, 4]["p"] == pytest.approx(1 / (1 + math.exp(-4)))
    assert by_pair[3, 4] == {"a": 3, "b": 4, "p": pytest.approx(1 / (1 + math.exp(-1))), "was": "filled"}
    assert report["dropped"] == {"the comparisons fall into parts that nothing connects": 1}
    assert report["sums"] == {f"comparisons {k}": v for k, v in
                              {"kept": 8, "moved": 0, "flipped": 1, "filled": 1}.items()}  # fmt: skip
    assert convert(Record("w", out), SOURCE).row is not None


@pytest.mark.parametrize(
    ("one", "expected"),
    [({"a": 0, "b": 1, "p": 0.9}, 0.9), ({"a": 1, "b": 0, "wins": 0, "of": 4}, 0.9), ({"a": 0, "b": 1, "p": 1.1}, None),
     ({"a": 0, "b": 0, "p": 0.5}, None), ({"a": 0, "b": 4, "p": 0.5}, None), ({"a": 0, "b": 1}, None), ("0>1", None),
     ({"a": 0, "b": 1, "wins": 3, "of": 2}, None), ({"a": True, "b": 0, "p": 0.5}, None)],
)  # fmt: skip
def test_comparisons_are_probabilities_or_counts(one: Any, expected: float | None) -> None:
    found = table("w", [one], 4)
    if expected is None:
        assert "comparisons[0]: expected {a, b, p}" in str(found)
    else:
        assert isinstance(found, np.ndarray)
        assert found[0, 1] == pytest.approx(expected)
        assert np.isnan(found[2]).all()


def test_comparisons_of_rows_that_have_rewards_replace_these() -> None:
    row = compared()
    for k, answer in enumerate(row["responses"]):
        answer["reward"] = k
    out = Complete(SOURCE)(Record("w", row)).rows[0]
    rewards = [a["reward"] for a in out["responses"]]
    assert rewards == sorted(rewards, reverse=True)
    assert "comparisons: expected a list" in str(Complete(SOURCE)(Record("w", {**row, "comparisons": []})).problem)


def test_strength_vectors() -> None:
    given = {(1.2, 0.8, 1.5): (1.166667, 0.286744), (-0.3, 0.1, -0.5): (-0.233333, 0.249444),
             (0.05, -0.02, 0.1): (0.043333, 0.049216)}  # fmt: skip
    for margins, want in given.items():
        found = Strength.of(margins)
        assert (found.mean, found.std) == pytest.approx(want, abs=1e-6)


def test_bands_and_ways() -> None:
    bands = Bands(-1.0, 0.5, 3.0, "flip", "soft", "smooth")
    assert [bands.way(s) for s in (-2, -1, 0, 0.5, 2.9, 3)] == ["flip", "soft", "soft", "keep", "keep", "smooth"]
    assert [Bands(2.0, 2.0, 3.0).way(s) for s in (-0.1, 0, 1.9, 2)] == ["flip", "keep", "keep", "keep"]
    assert thresholds(list(range(10)), 0.2, 0.4, 0.1) == (2, 4, 9)
    assert thresholds(list(range(10)), 0, 0, 0) == (0, 0, math.inf)
    flipped = mend(-2.0, "flip")
    assert flipped is not None
    assert (flipped.flipped, flipped.preference, flipped.margin) == (True, 1, 2)
    for strength in (-1.5, 0.7):
        soft = mend(strength, "soft")
        assert soft is not None
        assert soft.flipped == (strength < 0)
        assert soft.preference == pytest.approx(1 / (1 + math.exp(-abs(strength))))
    smooth = mend(4.0, "smooth", 0.1)
    assert smooth is not None
    assert smooth.preference == 0.9
    assert mend(0.0, "drop") is None
    assert soft_label(-800.0) == 0
    assert soft_label(800.0) == 1


def pair(name: str, margins: Any, **more: Any) -> dict[str, Any]:
    return {"id": name, "prompt": "q", "chosen": f"{name} good", "rejected": f"{name} bad", "margins": margins, **more}


def test_the_script_turns_pairs_over(tmp_path: Path) -> None:
    rows = [
        pair("a", [2.0, 1.0], chosen_source="x"),
        pair("b", {"m1": -2.0, "m2": -1.0}, chosen_reward=3, rejected_reward=1),
    ]
    rows.append(pair("c", ["high"]))
    argv = ("strength", "--", "--max-bad", "1")
    out, report = ran("repair", *argv, output=tmp_path / "o.jsonl", rows=rows)
    assert (out[0]["chosen"], out[0]["flipped"], out[0]["preference"]) == ("a good", False, 1)
    assert (out[1]["chosen"], out[1]["rejected"]) == ("b bad", "b good")
    assert (out[1]["chosen_reward"], out[1]["rejected_reward"]) == (1, 3)
    assert out[1]["margins"] == {"m1": 2.0, "m2": 1.0}
    assert (out[1]["strength"], out[1]["strength_std"]) == (1.5, 0.5)
    assert report["sums"] == {"pairs: keep": 1, "pairs: flip": 1, "pairs turned over": 1}
    assert report["problems"] == [
        "o-in.jsonl:3: margins: expected finite numbers, in a list or by name, got a list of 1"
    ]


def test_the_script_takes_thresholds_from_shares(tmp_path: Path) -> None:
    rows = [pair(str(k), [float(k)]) for k in range(10)]
    argv = ["strength", "--", "--shares", "0.2", "0.4", "0.1", "--lowest", "drop", "--unsure", "soft", "--highest"]
    out, report = ran("repair", *argv, "smooth", output=tmp_path / "o.jsonl", rows=rows)
    assert report["dropped"] == {"strength too low": 2}
    assert [r["id"] for r in out] == [str(k) for k in range(2, 10)]
    want = [soft_label(2), soft_label(3), 1, 1, 1, 1, 1, 0.9]
    assert [r["preference"] for r in out] == pytest.approx(want)


def test_margins_come_from_scores_of_both_sides() -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "chosen_scores": [1, 2], "rejected_scores": [2, 4]}
    out = ByStrength(SOURCE, Bands())(Record("w", row)).rows[0]
    assert (out["chosen"], out["chosen_scores"], out["strength"]) == ("b", [2, 4], 1.5)
    short = {**row, "rejected_scores": [1]}
    assert "rejected_scores: expected 2 numbers" in str(ByStrength(SOURCE, Bands())(Record("w", short)).problem)
    one = {"id": "x", "prompt": "q", "completion": "a", "margins": [1]}
    assert "expected a pair" in str(ByStrength(SOURCE, Bands())(Record("w", one)).problem)


def test_turning_twice_changes_nothing() -> None:
    row = {
        "chosen": 1,
        "rejected": 2,
        "chosen_x": 3,
        "score_rejected": 4,
        "chosen-rating": 5,
        "chosenness": 6,
        "margins": [1],
    }
    assert turned(turned(row)) == row
    assert turned(row) == {"rejected": 1, "chosen": 2, "rejected_x": 3, "score_chosen": 4, "rejected-rating": 5,
                           "chosenness": 6, "margins": [-1]}  # fmt: skip


def test_sspo_vector_of_unlabelled_losses() -> None:
    found = [unlabelled_loss(10 * r, 10 * 0.15) for r in (0.4, -0.7, 1.1, -0.1)]
    assert found == pytest.approx([0.039445, 0.000102, 0.000037, 0.039445], abs=1e-6)
    assert labels([0.4, -0.7, 1.1, -0.1], 0.15) == [True, False, True, False]
    assert labels([0.4, -0.7, 1.1, -0.1], 0.15, 0.3) == [None, False, True, None]


@pytest.mark.parametrize("prior", [0.5, 0.2])
def test_the_threshold_is_the_heads(prior: float) -> None:
    draw = random.Random(0)
    won, lost = [draw.gauss(1, 1) for _ in range(30)], [draw.gauss(-1, 1) for _ in range(30)]
    known = Scores()
    for k, (w, v) in enumerate(zip(won, lost)):
        known.add(w, True, f"w{k}".encode())
        known.add(v, False, f"l{k}".encode())
    score_GK = torch.tensor([won, lost], dtype=torch.float64).T
    win_GK = torch.tensor([[True, False]]).expand(30, 2)
    assert known.threshold("kde", prior) == pytest.approx(
        float(SSPO(prior=prior).least_risk(score_GK, win_GK, ~win_GK))
    )
    assert known.threshold("min") == min(won)

    def risk(d: float) -> float:
        below = [0.5 * math.erfc(-(d - s) / math.sqrt(2)) for s in (*won, *lost)]
        return prior * sum(below[:30]) / 30 + (1 - prior) * (1 - sum(below[30:]) / 30)

    grid = [min(lost) + (max(won) - min(lost)) * k / 1023 for k in range(1024)]
    assert known.threshold("kde", prior) == pytest.approx(min(grid, key=risk))


def test_a_stream_of_scores_needs_little_memory_and_no_order() -> None:
    draw = random.Random(1)
    stream = [(draw.gauss(0, 1), k % 2 == 0, f"{draw.random()}".encode()) for k in range(6 * SAMPLED)]
    found = []
    for order in (stream, stream[::-1]):
        known = Scores()
        for one in order:
            known.add(*one)
            assert max(len(known.won), len(known.lost)) <= 2 * SAMPLED
        found.append(known.threshold("kde"))
    assert found[0] == found[1]
    with pytest.raises(ValueError, match="no desirable and undesirable"):
        Scores().threshold("kde")


def test_the_script_labels_what_has_no_label(tmp_path: Path) -> None:
    def answer(reward: float, label: bool | None) -> dict[str, Any]:
        return {"content": f"r{reward}", "reward": reward, "label": label}

    rows: list[dict[str, Any]] = [
        {"id": "pair", "prompt": "q", "chosen": "a", "rejected": "b", "chosen_reward": 4, "rejected_reward": -2},
        {"id": "group", "prompt": "q", "responses": [answer(3, True), answer(-3, False)]},
        {"id": "free", "prompt": "q", "responses": [answer(5, None), answer(-5, None), answer(0.4, None)]},
        {"id": "some", "prompt": "q", "responses": [answer(-7, True), answer(-5, None)]},
        {"id": "one", "prompt": "q", "completion": "x", "reward": 9.0},
        {"id": "none", "prompt": "q", "completion": "x"},
    ]
    out, report = ran("repair", "pseudo", "--", "--band", "0.5", output=tmp_path / "o.jsonl", rows=rows)
    by_id = {r["id"]: r for r in out}
    assert by_id["pair"] == rows[0]
    assert by_id["group"] == rows[1]
    assert [(a["label"], a["pseudo"]) for a in by_id["free"]["responses"]][:2] == [(True, True), (False, True)]
    assert "pseudo" not in by_id["some"]["responses"][0]
    assert by_id["some"]["responses"][0]["label"] is True
    assert by_id["some"]["responses"][1]["label"] is False
    assert by_id["one"]["responses"][0]["label"] is True
    assert report["dropped"] == {"no reward on every answer": 1}
    assert report["sums"]["rows with labels of their own"] == 2
    assert report["options"]["at"] == pytest.approx(by_id_threshold(rows))


def by_id_threshold(rows: list[dict[str, Any]]) -> float:
    known = Scores()
    for k, (score, won) in enumerate([(4, True), (-2, False), (3, True), (-3, False), (-7, True)]):
        known.add(score, won, str(k).encode())
    return known.threshold("kde")


def test_without_labelled_rows_the_script_says_so(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [{"prompt": "q", "completion": "x", "reward": 1.0}])
    with pytest.raises(UserError, match="give rows with labels and reward"):
        script("repair").main(["pseudo", source, "-o", str(tmp_path / "o.jsonl")])
    assert isinstance(PseudoLabel(SOURCE, 0.0)(Record("w", {"prompt": "q", "completion": 3})).problem, tuple)


def test_kendall_and_what_was_found() -> None:
    assert kendall_tau([1, 2, 3], [1, 3, 2]) == pytest.approx(1 / 3)
    assert kendall_tau([1, 1], [1, 2]) == 0
    found = Found.of([True, True, False, False], [True, False, True, False])
    assert (found.precision, found.recall) == (0.5, 0.5)
    assert (Found.of([True], [False]).precision, Found.of([False], [True]).recall) == (1, 1)


def direction(name: str) -> repair.Line:
    return repair.measured(repair.settings()[name], 6)[0]


@pytest.mark.parametrize("name", [n for n in repair.settings() if n.startswith(("complete", "pseudo"))])
def test_planted_faults_are_found_and_the_ranking_gets_better(name: str) -> None:
    found = direction(name)
    assert found.recall > 0.8
    assert found.after > found.before + 0.05
    assert found.precision > 0.3


def test_flipped_labels_are_found_best_by_models_that_have_not_seen_them() -> None:
    plain, sure = direction("strength: 20% of the labels flipped"), direction("strength, below -1: 20% flipped")
    assert plain.recall > 0.7
    assert plain.after > plain.before + 0.1
    assert sure.precision > plain.precision + 0.1  # a threshold below 0 turns fewer over, and more of them rightly
    assert sure.after > sure.before + 0.1
    fresh, seen = direction("strength, 150 pairs: 20% flipped"), direction("strength, 150 pairs, in-fold: 20% flipped")
    assert fresh.recall > seen.recall + 0.15
