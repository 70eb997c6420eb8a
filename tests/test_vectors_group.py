"""Figures that were computed elsewhere, and what CoPG and the GRPO family make of the same numbers."""

from __future__ import annotations

import pytest
import torch
from heads_golden import from_sums
from heads_support import F64, Lengths, change, grid, loss_and_grad, random_input, segments
from torch.testing import assert_close

from po.heads.cispo import CISPO
from po.heads.copg import CoPG
from po.heads.dapo import DAPO
from po.heads.dr_grpo import DrGRPO
from po.heads.grpo import GRPO
from po.heads.grpo2 import GRPO2
from po.heads.grpo_kl import GRPOKL
from po.heads.gspo import GSPO
from po.heads.luspo import LUSPO
from po.types import Head, HeadInput

# Figures of an independent float64 script, to 6 decimals: four responses with their advantages, the policy's, the
# sampler's and the reference's log-probs. The script's figures were compared with the executed code of TRL and verl.
LOGP = [[-1, -0.5, -2, -0.3], [-0.7, -1.2, -0.9], [-0.4, -1.5], [-2.2, -0.1, -0.6, -1.1]]
OLD = [[-1.05, -0.2, -2.25, -0.3], [-1.1, -1.1, -0.55], [-0.35, -1.65], [-3.4, -0.12, -0.1, -1.09]]
REF = [[-1.1, -0.3, -2.3, -0.35], [-0.6, -1.4, -0.9], [-0.7, -1.2], [-2.4, -0.2, -0.5, -1.1]]
ADVANTAGE = [0.7, -1.1, 0.4, -0.3]
NARROW = {"epsilon_low": 0.2, "epsilon_high": 0.2, "scale": "none"}

Rows = list[list[float]]  # the tokens of each response
BY_RESPONSE: Rows = [[-0.045993, -0.032411, 0, -0.04375], [0.136751, 0.082943, 0], [-0.047561, -0.058092]]
BY_TOKEN: Rows = [[-0.056607, -0.03989, 0, -0.053846], [0.126231, 0.076563, 0], [-0.029269, -0.035749]]
VECTORS: dict[str, tuple[Head, float, Rows]] = {
    "grpo": (GRPO(**NARROW), 0.127665, [*BY_RESPONSE, [0.062252, 0.019129, 0, 0.018563]]),
    "two-sided": (GRPO(**NARROW, delta=2.0), 0.102912, [*BY_RESPONSE, [0, 0.019129, 0, 0.018563]]),
    "token mean": (DAPO(**NARROW), 0.131981, [*BY_TOKEN, [0.076618, 0.023543, 0, 0.022847]]),
    "clip higher": (DAPO(scale="none"), 0.127673, [*BY_TOKEN, [0.076618, 0.023543, 0, 0.022847]]),
    "dual clip": (DAPO(**NARROW, delta=3.0), 0.124594, [*BY_TOKEN, [0, 0.023543, 0, 0.022847]]),
    "dr_grpo": (
        DrGRPO(max_completion_length=6),
        0.07149,
        [
            [-0.030662, -0.021607, 0, -0.029167],
            [0.068375, 0.041472, 0],
            [-0.015854, -0.019364],
            [0.041501, 0.012753, 0, 0.012376],
        ],
    ),
    "token sum": (
        DrGRPO(max_completion_length=1),
        0.428938,
        [
            [-0.183972, -0.129643, 0, -0.175],
            [0.410252, 0.24883, 0],
            [-0.095123, -0.116183],
            [0.249009, 0.076515, 0, 0.074254],
        ],
    ),
    "kl": (
        GRPOKL(**NARROW, beta=0.04),
        0.12844,
        [
            [-0.045755, -0.032964, 0.000648, -0.043628],
            [0.1364, 0.083548, 0],
            [-0.046266, -0.059841],
            [0.062705, 0.019367, -0.000263, 0.018563],
        ],
    ),
    "cispo as TRL with epsilon_high 1.25": (
        CISPO(scale="none", epsilon_high=1.25 - 1),
        -0.026273,
        [
            [-0.056607, -0.03989, -0.067308, -0.053846],
            [0.105769, 0.076563, 0.059627],
            [-0.029269, -0.035749],
            [0.028846, 0.023543, 0.013997, 0.022847],
        ],
    ),
    "cispo as verl": (
        CISPO(scale="none", epsilon_low=0.2, epsilon_high=0.28),
        -0.034686,
        [
            [-0.056607, -0.043077, -0.068923, -0.053846],
            [0.108308, 0.076563, 0.067692],
            [-0.029269, -0.035749],
            [0.029538, 0.023543, 0.018462, 0.022847],
        ],
    ),
    "gspo": (GSPO(**NARROW), 0.079895, [[-0.04375] * 4, [0.090152] * 3, [-0.052564] * 2, [0.022392] * 4]),
    "luspo": (LUSPO(**NARROW), 0.259378, [[-0.175] * 4, [0.270455] * 3, [-0.105127] * 2, [0.089567] * 4]),
}


def flat(rows: Rows) -> torch.Tensor:
    return torch.tensor([v for row in rows for v in row], dtype=F64)


def of_tokens(lengths: Lengths, logp: Rows, old: Rows, ref: Rows) -> HeadInput:
    policy_T = flat(logp).requires_grad_(True)
    return HeadInput(segments(lengths), policy_T, old=flat(old), ref=flat(ref), correction=torch.ones_like(policy_T))


@pytest.mark.parametrize("name", VECTORS)
def test_vectors(name: str) -> None:
    """Each response stands beside another of one token with the opposite reward, so that R - mean(R) is its advantage;
    the figures are of the four alone."""
    head, loss, grad = VECTORS[name]
    rows = [[v for row in t for v in (row, [-1.0])] for t in (LOGP, OLD, REF)]
    x = change(of_tokens([[len(r), 1] for r in LOGP], *rows), reward=grid([[A, -A] for A in ADVANTAGE]))
    first_T = x.seg.slot_T % 2 == 0
    out = head(x).loss
    of_four = out[first_T].mean() if head.needs.unit == "token" else out[:, 0].mean()
    (grad_T,) = torch.autograd.grad(of_four, x.policy_T)
    assert of_four.item() == pytest.approx(loss, abs=6e-7)
    assert_close(grad_T[first_T], flat(grad), rtol=0, atol=6e-7)


PAPER_2 = 0.033766, [[-0.131409, -0.092602, 0, -0.125], [0.248637, 0.150806, 0]]
TRL_2 = 0.023873, [[-0.092907, -0.06547, 0, -0.088376], [0.175788, 0.106621, 0]]


@pytest.mark.parametrize(
    ("head", "better", "figure"),
    [
        (GRPO2(epsilon_high=0.2), 1.0, PAPER_2),
        (GRPO2(epsilon_high=0.2), 0.25, PAPER_2),
        (GRPO(scale="population"), 0.25, PAPER_2),
        (GRPO(eps=1e-4), 1.0, TRL_2),
    ],
    ids=["paper", "paper-other-gap", "grpo", "TRL"],
)
def test_two_samples(head: Head, better: float, figure: tuple[float, Rows]) -> None:
    """The paper's +-1, whatever the gap, and TRL's +-0.707, which its eps makes of the rewards 1 and 0."""
    loss, grad = figure
    x = of_tokens([[4, 3]], LOGP[:2], OLD[:2], REF[:2])
    loss_GK, grad_T = loss_and_grad(head, change(x, reward=grid([[better, 0.0]])))
    assert loss_GK.mean().item() == pytest.approx(loss, abs=6e-7)
    assert_close(grad_T, flat(grad), rtol=0, atol=6e-7)


@pytest.mark.parametrize(
    ("K", "loss", "grad"), [(2, -2.176, [-1.12, 1.12]), (4, -1.236, [-0.726667, 0.02, -0.126667, 0.833333])]
)
def test_copg_vectors(K: int, loss: float, grad: list[float]) -> None:
    logp, ref = [-12.3, -15.1, -9.8, -20.4], [-13.0, -14.2, -10.5, -19.9]
    x = from_sums([logp[:K]], [ref[:K]], [[7, 9, 5, 11][:K]], [[1.2, -0.4, 0.3, -1.5][:K]])
    loss_G, grad_T = loss_and_grad(CoPG(beta=0.3), x)
    assert loss_G.item() == pytest.approx(loss, abs=6e-7)
    assert_close(grad_T, x.seg.spread(torch.tensor([grad], dtype=F64)), rtol=0, atol=6e-7)


PAPER, PEERS = GRPO(scale="population"), [GRPO(eps=1e-4), GRPO(eps=1e-6), GRPO(scale="none")]  # TRL, verl, Dr. GRPO
TABLE: dict[tuple[float, ...], list[list[float]]] = {
    (1, 0): [[1, -1], [0.707007, -0.707007], [0.707106, -0.707106], [0.5, -0.5]],
    (1, 1): [[0, 0], [0, 0], [0, 0], [0, 0]],
    (1, 0, 0, 0): [
        [1.732051] + [-0.57735] * 3,
        [1.4997] + [-0.4999] * 3,
        [1.499997] + [-0.499999] * 3,
        [0.75] + [-0.25] * 3,
    ],
    (1, 1, 1, 0, 0, 0, 0, 0): [
        [1.290994] * 3 + [-0.774597] * 5,
        [1.207381] * 3 + [-0.724429] * 5,
        [1.207612] * 3 + [-0.724567] * 5,
        [0.625] * 3 + [-0.375] * 5,
    ],
    (0.9, 0.1): [[1, -1], [0.706982, -0.706982], [0.707106, -0.707106], [0.4, -0.4]],
}  # fmt: skip


@pytest.mark.parametrize("rewards", TABLE)
def test_advantages_at_policy_equals_sampler(rewards: tuple[float, ...]) -> None:
    """There the loss is -A, by each convention."""
    lengths = [[2, 1, 3, 1, 2, 1, 1, 4][: len(rewards)]]
    x = random_input(GRPO(), lengths, same=True, reward=grid([list(rewards)]))
    x = change(x, correction=torch.ones_like(x.policy_T))
    for head, A in zip([PAPER, *PEERS], TABLE[rewards], strict=True):
        assert_close(-head(x).loss, torch.tensor([A], dtype=F64), rtol=0, atol=6e-7)
    if len(rewards) == 2:
        assert_close(GRPO2()(x).loss, PAPER(x).loss)
