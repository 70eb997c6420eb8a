"""Reward models' objectives: known values, mpmath without po's code, gradients, gaps that overflow elsewhere."""

from __future__ import annotations

import itertools
import math

import mpmath as mp
import pytest
import torch

from po.reward_model.losses import bradley_terry, contrastive, ordinal, region, wins

CHOSEN, REJECTED, MARGIN = [1.2, 0.3, -0.4], [0.7, 0.9, -1.0], [0.5, 0.0, 1.0]
LOGITS = [0.0, 0.8, -0.7], [0.0, -0.8, -0.9]


def leaf(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(
    ("options", "value", "gradient"),
    [
        ({}, 0.649684, [-0.125847, -0.215219, -0.118115, 0.125847, 0.215219, 0.118115]),
        ({"margin_N": MARGIN}, 0.881217, [-0.166667, -0.215219, -0.199563, 0.166667, 0.215219, 0.199563]),
        ({"center": 0.01}, 0.673051, [-0.11318, -0.207219, -0.127448, 0.138514, 0.223219, 0.108781]),
        ({"label_smoothing": 0.1}, 0.666351, [-0.092514, -0.181885, -0.084781, 0.092514, 0.181885, 0.084781]),
    ],
)
def test_bradley_terry_vectors(options: dict[str, object], value: float, gradient: list[float]) -> None:
    chosen_N, rejected_N = leaf(CHOSEN), leaf(REJECTED)
    given = {k: torch.tensor(v, dtype=torch.float64) if isinstance(v, list) else v for k, v in options.items()}
    loss = bradley_terry(chosen_N, rejected_N, **given).mean()  # type: ignore[arg-type]
    loss.backward()
    assert loss.item() == pytest.approx(value, abs=1e-6)
    assert [*chosen_N.grad.tolist(), *rejected_N.grad.tolist()] == pytest.approx(gradient, abs=1e-6)


def _bt(c: float, r: float, m: float, p: float, a: float, center: float) -> mp.mpf:
    sigmoid = lambda x: 1 / (1 + mp.exp(-x))  # noqa: E731
    d, q = mp.mpf(c) - r - m, mp.mpf(p) * (1 - a) + (1 - mp.mpf(p)) * a
    return -q * mp.log(sigmoid(d)) - (1 - q) * mp.log(sigmoid(-d)) + center * (mp.mpf(c) + r) ** 2


def test_bradley_terry_with_everything_is_its_formula() -> None:
    chosen_N, rejected_N = leaf(CHOSEN), leaf(REJECTED)
    margin_N, preference_N = leaf(MARGIN), leaf([0.9, 0.5, 0.66])
    loss_N = bradley_terry(chosen_N, rejected_N, margin_N, preference_N, 0.05, 0.02)
    loss_N.sum().backward()
    for n, (c, r, m, p) in enumerate(zip(CHOSEN, REJECTED, MARGIN, [0.9, 0.5, 0.66])):
        assert loss_N[n].item() == pytest.approx(float(_bt(c, r, m, p, 0.05, 0.02)), abs=1e-12)
        by_c = mp.diff(lambda x, r=r, m=m, p=p: _bt(x, r, m, p, 0.05, 0.02), c)
        by_r = mp.diff(lambda x, c=c, m=m, p=p: _bt(c, x, m, p, 0.05, 0.02), r)
        assert chosen_N.grad[n].item() == pytest.approx(float(by_c), abs=1e-9)
        assert rejected_N.grad[n].item() == pytest.approx(float(by_r), abs=1e-9)


def test_a_preference_below_one_half_is_the_pair_turned_over() -> None:
    chosen_N, rejected_N = torch.tensor(CHOSEN), torch.tensor(REJECTED)
    p_N = torch.tensor([0.1, 0.3, 0.0])
    turned_N = bradley_terry(rejected_N, chosen_N, preference_N=1 - p_N)
    torch.testing.assert_close(bradley_terry(chosen_N, rejected_N, preference_N=p_N), turned_N)


@pytest.mark.parametrize("gap", [-1e8, -1000.0, 1000.0, 1e8])
def test_any_gap_stays_finite_and_the_wrong_side_keeps_its_gradient(gap: float) -> None:
    chosen_N = torch.tensor([gap / 2], requires_grad=True)
    loss = bradley_terry(chosen_N, torch.tensor([-gap / 2]), label_smoothing=0.1)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert chosen_N.grad.item() == pytest.approx(0.1 if gap > 0 else -0.9, abs=1e-6)


def test_centering_pulls_both_scores_to_zero_and_leaves_the_difference() -> None:
    chosen_N, rejected_N = leaf([5.0]), leaf([4.0])
    plain = torch.autograd.grad(bradley_terry(chosen_N, rejected_N).sum(), [chosen_N, rejected_N])
    pulled = torch.autograd.grad(bradley_terry(chosen_N, rejected_N, center=0.01).sum(), [chosen_N, rejected_N])
    assert (pulled[0] - plain[0]).item() == pytest.approx(0.18)
    assert (pulled[0] - plain[0]).item() == pytest.approx((pulled[1] - plain[1]).item())


def test_ordinal_vector_and_its_gradient() -> None:
    chosen_NS, rejected_NS = (torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in LOGITS)
    loss = ordinal(chosen_NS, rejected_NS).sum()
    loss.backward()
    assert loss.item() == pytest.approx(0.852468, abs=1e-6)
    assert chosen_NS.grad[0].tolist() == pytest.approx([0.268664, -0.157714, -0.11095], abs=1e-6)
    assert rejected_NS.grad[0].tolist() == pytest.approx([-0.385418, 0.166349, 0.219069], abs=1e-6)
    assert math.exp(-loss.item()) == pytest.approx(0.426361, abs=1e-6)


def _p(logits: list[float]) -> list[mp.mpf]:
    weights = [mp.exp(x) for x in logits]
    return [w / mp.fsum(weights) for w in weights]


def test_probability_that_one_is_rated_higher_ties_apart() -> None:
    above = mp.fsum(_p(LOGITS[0])[i] * _p(LOGITS[1])[j] for i in range(3) for j in range(i))
    below = mp.fsum(_p(LOGITS[0])[i] * _p(LOGITS[1])[j] for j in range(3) for i in range(j))
    found = wins(torch.tensor([LOGITS[0]]), torch.tensor([LOGITS[1]]))
    assert found.item() == pytest.approx(float(above / (above + below)), abs=1e-6)


def test_ties_count_as_losses_and_certainty_costs_nothing() -> None:
    even = torch.zeros(1, 9)
    assert ordinal(even, even).item() == pytest.approx(-math.log(36 / 81), abs=1e-6)
    sure = torch.full((1, 9), -1000.0).index_fill(1, torch.tensor([8]), 1000.0)
    assert ordinal(sure, sure.flip(1)).item() == 0
    wrong = ordinal(sure.flip(1).requires_grad_(), sure)
    assert wrong.isfinite().all()
    assert wrong.item() > 1000


@pytest.mark.parametrize("triangle", [False, True])
def test_quality_restricts_the_sum(triangle: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    chosen_NS, rejected_NS = torch.randn(2, 7, 9, generator=generator, dtype=torch.float64)
    levels = [(3, 1), (3, 3), (3, 2), (2, 2), (1, 1), (0, 0), (2, 1)]
    allowed = region(*(torch.tensor([float(p[k]) for p in levels]) for k in (0, 1)), 3, 9, triangle)
    found = ordinal(chosen_NS, rejected_NS, allowed)
    for n, (c, r) in enumerate(levels):
        pc, pr = _p(chosen_NS[n].tolist()), _p(rejected_NS[n].tolist())
        lowest, highest = 3 * (r - 1), 3 * c  # of the triangle
        cells = [
            (i, j)
            for i, j in itertools.product(range(9), range(9))
            if i > j and (c == 0 or (lowest <= j and i < highest if triangle else i // 3 == c - 1 and j // 3 == r - 1))
        ]
        assert found[n].item() == pytest.approx(float(-mp.log(mp.fsum(pc[i] * pr[j] for i, j in cells))), abs=1e-9)


def test_contrastive_is_its_formula_and_lone_texts_have_nothing_to_tell_apart() -> None:
    generator = torch.Generator().manual_seed(1)
    first_ND, second_ND = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    found = contrastive(first_ND, second_ND, 0.1)
    cosine = torch.nn.functional.cosine_similarity(first_ND[:, None], second_ND[None], dim=-1) / 0.1
    for i in range(3):
        terms = [mp.exp(x) for x in cosine[i].tolist()]
        assert found[i].item() == pytest.approx(float(-mp.log(terms[i] / mp.fsum(terms))), abs=1e-9)
    assert contrastive(first_ND[:1], second_ND[:1], 0.1).item() == pytest.approx(0)
