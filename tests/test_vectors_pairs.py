"""Loss and gradient of DPO's relatives against figures computed elsewhere. Formulas: tests/test_golden_pairs.py.

The figures are of an independent float64 script that also ran the public implementations named beside each case, to 6
decimals: losses of the rows, and the gradient of their mean with respect to each response's summed log-prob.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from heads_golden import (
    PAIR_LENGTHS,
    PAIR_LOGP,
    PAIR_REF,
    check_pair_vector,
    from_sums,
)
from heads_support import (
    F64,
    change,
    grid,
    input_from_logratios,
    loss_and_grad,
    parts,
    segments,
)
from torch import Tensor
from torch.testing import assert_close

from po.heads.bvpo import BVPO
from po.heads.cream import CREAM
from po.heads.dpo_norm import DPONorm
from po.heads.dpop import DPOP
from po.heads.exo_pref import EXOPref
from po.heads.exo_rw import EXORw
from po.heads.fdpo import FDPO
from po.heads.hinge import Hinge
from po.heads.hybrid_dpo import HybridDPO
from po.heads.ld_dpo import LDDPO
from po.heads.rdpo import RDPO
from po.heads.rpo_sft import RPOSft
from po.heads.sem_dpo import SemDPO
from po.heads.sppo_hard import SPPOHard
from po.heads.wpo import WPO
from po.heads.wpo_unaligned import WPOUnaligned
from po.types import Head, HeadInput

PAIR_VECTORS: list[tuple[Head, list[float], list[float], list[float]]] = [
    # TRL 1.16 robust
    (
        RDPO(beta=0.1, epsilon=0.1),
        [0.616974, 0.857189, 0.605148],
        [-0.019793, -0.022906, -0.019627],
        [0.019793, 0.022906, 0.019627],
    ),
    # TRL 1.16 forward_kl, f-DPO repo
    (
        FDPO(beta=0.1, divergence="forward_kl"),
        [0.620473, 0.866115, 0.607609],
        [-0.009347, -0.067412, -0.008330],
        [0.032624, 0.005534, 0.035512],
    ),
    # TRL 1.16 js, f-DPO repo
    (
        FDPO(beta=0.1, divergence="js"),
        [0.660556, 0.757599, 0.655466],
        [-0.006084, -0.013764, -0.005679],
        [0.010945, 0.003943, 0.011228],
    ),
    # f-DPO repo with alpha 0.3, TRL 1.16 with coefficient 0.7
    (
        FDPO(beta=0.1, divergence="alpha", alpha=0.3),
        [0.630007, 0.829261, 0.620157],
        [-0.013410, -0.027336, -0.012867],
        [0.019512, 0.012913, 0.019879],
    ),
    # TRL 1.16 sigmoid, as DPO
    (
        FDPO(beta=0.1, divergence="reverse_kl"),
        [0.632599, 0.825939, 0.623273],
        [-0.015626, -0.018739, -0.015460],
        [0.015626, 0.018739, 0.015460],
    ),
    # TRL 1.16 sigmoid_norm
    (
        DPONorm(beta=5.0),
        [0.281150, 1.845937, 0.119680],
        [-0.081695, -0.175442, -0.062664],
        [0.068079, 0.200505, 0.046998],
    ),
    # TRL 1.16 hinge
    (Hinge(beta=0.1), [0.875, 1.25, 0.855], [-0.033333] * 3, [0.033333] * 3),
    # TRL 1.16 sppo_hard
    (
        SPPOHard(beta=0.1),
        [38.312500, 78.125000, 36.582500],
        [-3.000000, -4.166667, -2.933333],
        [2.833333, 4.166667, 2.766667],
    ),
    # no public counterpart
    (
        RPOSft(beta=0.1, eta=0.005),
        [0.638849, 0.836064, 0.627273],
        [-0.015793, -0.018906, -0.015627],
        [0.015626, 0.018739, 0.015460],
    ),
    # TRL 1.16 exo_pair
    (
        EXOPref(beta_pi=0.1, epsilon=0.001),
        [2.547625, 3.198420, 2.513920],
        [-0.056294, -0.058717, -0.056053],
        [0.056294, 0.058717, 0.056053],
    ),
    # EXO repo, exact_loss exo-pref
    (
        EXOPref(beta_pi=0.1, labels="official"),
        [3.996708, 4.936370, 3.947608],
        [-0.081971, -0.084096, -0.081695],
        [0.081971, 0.084096, 0.081695],
    ),
    # no public counterpart
    (
        DPOP(beta=0.1, lam=5.0),
        [0.632599, 1.223445, 0.623273],
        [-0.015626, -0.141157, -0.015460],
        [0.015626, 0.023526, 0.015460],
    ),
]


@pytest.mark.parametrize(("head", "rows", "better", "worse"), PAIR_VECTORS, ids=lambda v: str(v)[:50])
def test_pair_vectors(head: Head, rows: list[float], better: list[float], worse: list[float]) -> None:
    check_pair_vector(head, rows, better, worse)


def check_sums(head: Head, x: HeadInput, rows: list[float], better: list[float]) -> None:
    """As check_pair_vector, for inputs with more than log-probs and gradients that are opposite within a pair."""
    loss_G, grad_T = loss_and_grad(head, x)
    assert_close(loss_G, torch.tensor(rows, dtype=F64), rtol=0, atol=6e-7)
    grad_GK = torch.tensor([better, [-v for v in better]], dtype=F64).T.contiguous()
    assert_close(grad_T, x.seg.spread(grad_GK), rtol=0, atol=6e-7)


def vector_pairs(**fields: Any) -> HeadInput:
    return change(from_sums(PAIR_LOGP, PAIR_REF, PAIR_LENGTHS, [[1.0, 0.0]] * 3), **fields)


def test_cream_vectors() -> None:
    """No public counterpart; the second is a pair with h = 1.6 and Kendall's tau 0.4."""
    x = vector_pairs(columns={"consistency": torch.tensor([0.9, 0.2, 0.5], dtype=F64)})
    check_sums(CREAM(beta=0.1), x, [0.645099, 0.625939, 0.695773], [-0.012293, 0.007927, 0.001206])
    x = change(input_from_logratios([[1.0, -0.6]]), columns={"consistency": torch.tensor([(0.4 + 1) / 2], dtype=F64)})
    check_sums(CREAM(beta=0.1), x, [0.664344], [-0.016009])


def test_sem_dpo_vector() -> None:
    """No public counterpart. Distances 0.05, 0.2 and 0.6 from embeddings of any length."""
    cosines = [0.95, 0.8, 0.4]
    chosen = [[3 * c, 3 * math.sqrt(1 - c**2)] for c in cosines]
    embedding = torch.tensor([[e, [7.0, -1.0]] for e in chosen], dtype=F64)
    x = vector_pairs(embedding=embedding, prompt_embedding=torch.tensor([[0.5, 0.0]] * 3, dtype=F64))
    check_sums(SemDPO(beta=0.1, alpha=2.0), x, [0.572399, 0.553644, 0.187726], [-0.014139, -0.012561, -0.004657])
    assert_close(SemDPO()(x).metrics["sem_dpo/distance"], torch.tensor([0.05, 0.2, 0.6], dtype=F64))


def test_bvpo_vector() -> None:
    """No public counterpart. The paper's objective of one pair from each source is the sum of the two, not the mean."""
    x = from_sums([[-29.0, -32.0], [-11.5, -13.25]], [[-30.0, -31.0], [-12.0, -13.0]], ((4, 5), (2, 3)), [[1, 0]] * 2)
    x = change(x, columns={"thinking": torch.tensor([1.0, 0.0], dtype=F64)})
    loss_G, grad_T = loss_and_grad(BVPO(beta=0.1, alpha=0.5), x)
    assert loss_G.sum().item() == pytest.approx(0.627245, abs=6e-7)
    grad_GK = torch.tensor([[-0.022508, 0.022508], [-0.024063, 0.024063]], dtype=F64)
    assert_close(2 * grad_T, x.seg.spread(grad_GK), rtol=0, atol=6e-7)


# One pair down to logits over four words (rows: positions that predict a token), with the tokens chosen there.
LOGITS = [
    [0.2, -0.1, 0.5, 0.0],
    [1.0, 0.3, -0.4, 0.1],
    [-0.2, 0.8, 0.1, 0.4],
    [-0.3, 0.6, 0.2, 0.1],
    [0.4, 0.0, -0.5, 0.9],
]
REF_LOGITS = [
    [0.0, 0.1, 0.3, -0.2],
    [0.7, 0.2, -0.1, 0.3],
    [0.1, 0.6, 0.2, 0.2],
    [0.1, 0.2, 0.3, 0.0],
    [0.2, 0.1, 0.0, 0.4],
]
TOKENS = [2, 0, 3, 1, 2]


def grad_of_logits(head: Head) -> tuple[float, Tensor]:
    """The pair's loss, and its gradient with respect to the policy's logits."""
    logits_TV = torch.tensor(LOGITS, dtype=F64, requires_grad=True)
    logp_TV, ref_TV = logits_TV.log_softmax(-1), torch.tensor(REF_LOGITS, dtype=F64).log_softmax(-1)
    token_T1 = torch.tensor(TOKENS)[:, None]
    collision_T = logp_TV.detach().exp().square().sum(-1).log()
    policy_T, ref_T = (t.gather(-1, token_T1)[:, 0] for t in (logp_TV, ref_TV))
    loss = parts(head, HeadInput(segments([[3, 2]]), policy_T, ref=ref_T, collision=collision_T)).loss
    return loss.item(), torch.autograd.grad(loss, logits_TV)[0]


LOGIT_VECTORS: list[tuple[Head, float, list[list[float]]]] = [
    # TRL 1.16 use_weighting
    (
        WPO(beta=0.1),
        0.545409,
        [
            [0.010233, 0.007581, -0.026191, 0.008378],
            [-0.021395, 0.009241, 0.004589, 0.007566],
            [0.005806, 0.015782, 0.007837, -0.029425],
            [-0.006061, 0.025096, -0.009993, -0.009042],
            [-0.010738, -0.007198, 0.035638, -0.017703],
        ],
    ),
    # no public counterpart
    (
        WPOUnaligned(beta=0.1),
        0.046132,
        [
            [0.000866, 0.000641, -0.002215, 0.000709],
            [-0.001810, 0.000782, 0.000388, 0.000640],
            [0.000491, 0.001335, 0.000663, -0.002489],
            [-0.000513, 0.002123, -0.000845, -0.000765],
            [-0.000908, -0.000609, 0.003014, -0.001497],
        ],
    ),
    # TRL 1.16 ld_alpha
    (
        LDDPO(beta=0.1, alpha=0.5),
        0.659273,
        [
            [0.012349, 0.009148, -0.031608, 0.010111],
            [-0.025820, 0.011152, 0.005538, 0.009130],
            [0.003503, 0.009523, 0.004729, -0.017755],
            [-0.007315, 0.030286, -0.012060, -0.010912],
            [-0.012958, -0.008686, 0.043009, -0.021364],
        ],
    ),
]


@pytest.mark.parametrize(("head", "loss", "grad"), LOGIT_VECTORS, ids=lambda v: str(v)[:30])
def test_vectors_down_to_logits(head: Head, loss: float, grad: list[list[float]]) -> None:
    found, grad_TV = grad_of_logits(head)
    assert found == pytest.approx(loss, abs=6e-7)
    assert_close(grad_TV, torch.tensor(grad, dtype=F64), rtol=0, atol=6e-7)


@pytest.mark.parametrize(
    ("head", "loss", "grad"),
    [
        (RDPO(beta=0.1), 0.693147, [-0.0625, 0.0625]),  # -b [(1 - e) / 2 + e / 2] / (1 - 2 e)
        (FDPO(divergence="reverse_kl"), 0.693147, [-0.05, 0.05]),
        (FDPO(divergence="forward_kl"), 0.693147, [-0.05, 0.05]),
        (FDPO(divergence="alpha", alpha=0.3), 0.693147, [-0.05, 0.05]),
        (FDPO(divergence="js"), 0.693147, [-0.025, 0.025]),
        (DPONorm(beta=5.0), 0.693147, [-2.5, 2.5]),
        (LDDPO(beta=0.1), 0.693147, [-0.05, 0.05]),
        (Hinge(beta=0.1), 1.0, [-0.1, 0.1]),
        (SPPOHard(beta=0.1), 50.0, [-10.0, 10.0]),
        (EXOPref(beta_pi=0.1), 2.761231, [-0.172669, 0.172669]),
        (EXOPref(beta_pi=0.1, labels="official"), 4.306853, [-0.25, 0.25]),
        (DPOP(beta=0.1), 0.693147, [-0.05, 0.05]),  # the penalty has no gradient at its kink
    ],
    ids=lambda v: str(v)[:40],
)
def test_values_at_policy_equals_reference(head: Head, loss: float, grad: list[float]) -> None:
    loss_G, grad_T = loss_and_grad(head, input_from_logratios([[0.0, 0.0]]))
    assert_close(loss_G, torch.tensor([loss], dtype=F64), rtol=0, atol=6e-7)
    assert_close(grad_T, torch.tensor(grad, dtype=F64), rtol=0, atol=6e-7)


def test_values_at_policy_equals_reference_of_the_others() -> None:
    """Where it depends on the row: one token each, log-probs -2 (better) and -1 (worse)."""
    x = HeadInput(segments([[1, 1]]), torch.tensor([-2.0, -1.0], dtype=F64), ref=torch.tensor([-2.0, -1.0], dtype=F64))
    half = torch.tensor([0.5], dtype=F64)
    x = change(
        x, columns={"consistency": 1.8 * half, "thinking": 2 * half}, collision=torch.full((2,), -1.0, dtype=F64)
    )
    x = change(x, embedding=grid([[1.0, 5.0]])[..., None], prompt_embedding=grid([[-1.0]]))
    log2, clipped = math.log(2), math.log1p(math.exp(0.1))  # D(ref) = -1
    expected: list[tuple[Head, float, list[float]]] = [
        (CREAM(beta=0.1), log2, [-0.04, 0.04]),  # 2 C - 1 = 0.8 of DPO's step
        (BVPO(beta=0.1, alpha=0.3), 0.3 * log2, [-0.015, 0.015]),
        (SemDPO(beta=0.1, alpha=0.5), math.exp(-1) * log2, [-0.05 * math.exp(-1), 0.05 * math.exp(-1)]),
        (WPO(beta=0.1), math.exp(-1) * log2, [-0.05 * math.exp(-1), 0.05 * math.exp(-1)]),
        (WPOUnaligned(beta=0.1), math.exp(-3) * log2, [-0.05 * math.exp(-3), 0.05 * math.exp(-3)]),
        (RPOSft(beta=0.1, eta=0.5), log2 + 0.1, [-0.1, 0.05]),
        (RPOSft(beta=0.1, eta=0.5, sft_reduction="token_mean"), log2 + 1, [-0.55, 0.05]),
        (HybridDPO(beta=0.1), clipped, [-0.1 / (1 + math.exp(-0.1)), 0.1 / (1 + math.exp(-0.1))]),
    ]
    for head, loss, grad in expected:
        loss_G, grad_T = loss_and_grad(head, x)
        assert loss_G.tolist() == pytest.approx([loss]), head
        assert grad_T.tolist() == pytest.approx(grad), head


def test_exo_on_a_set_at_policy_equals_reference() -> None:
    """KL from the uniform distribution to the rewards' softmax; equal rewards give 0."""
    x = input_from_logratios([[0.0] * 3, [0.0] * 3], [[0.0, 0.5, 0.5 * math.log(2)], [4.0] * 3])
    loss_G, _ = loss_and_grad(EXORw(beta_r=0.5), x)
    weights = [1.0, math.e, 2.0]
    expected = sum(math.log(sum(weights) / 3 / w) for w in weights) / 3
    assert_close(loss_G, torch.tensor([expected, 0.0], dtype=F64))
