"""CoPG's bandit by expected gradients: nothing is drawn, so that what is claimed can be asserted to the digit."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import copg_bandit
from harness import bandit
from harness.bandit import BEST_A, F64, by_head, fixed_point, largest_pair_gradient, methods, regret


def rest(name: str) -> tuple[list[float], float]:
    """Where a method ends: its policy and its regret."""
    logits_A = fixed_point(methods()[name])
    return logits_A.softmax(-1).tolist(), regret(logits_A[None]).item()


def test_the_optimum_is_known() -> None:
    """pi* earns beta log of the mean of exp(R / beta); the reference 1.8333 without any KL."""
    assert BEST_A.tolist() == pytest.approx([0.705385, 0.259496, 0.035119], abs=1e-6)
    assert bandit.objective(BEST_A.log()[None]).item() == pytest.approx(2.125200, abs=1e-6)
    assert regret(torch.zeros(1, 3, dtype=F64)).item() == pytest.approx(0.291867, abs=1e-6)


def test_copg_reaches_the_optimum_and_is_at_rest_there_in_every_pair() -> None:
    assert rest("CoPG")[1] < 1e-9
    assert largest_pair_gradient(methods()["CoPG"], BEST_A.log()) < 1e-9
    assert largest_pair_gradient(methods()["CoPG"], torch.zeros(3, dtype=F64)) > 0.1


def test_the_mistake_in_beta_optimises_twice_beta() -> None:
    """0.0468 is the regret of whoever forgot the half."""
    policy, lost = rest("CoPG, mis-scaled beta")
    assert lost == pytest.approx(0.046779, abs=1e-6)
    assert policy == pytest.approx((bandit.REWARD_A / (2 * bandit.BETA)).softmax(-1).tolist(), abs=1e-6)
    assert largest_pair_gradient(methods()["CoPG, mis-scaled beta"], BEST_A.log()) > 1
    doubled = bandit.Method(by_head("copg", beta=2 * bandit.BETA))
    assert fixed_point(doubled).softmax(-1).tolist() == pytest.approx(policy, abs=1e-6)


def test_the_others_keep_their_bias() -> None:
    policy, lost = rest("IPO")
    assert (policy, lost) == (pytest.approx([0.424, 0.353, 0.223], abs=1e-3), pytest.approx(0.152531, abs=1e-5))
    policy, lost = rest("PG, b = 0")
    assert (policy, lost) == (pytest.approx([0.194, 0.250, 0.556], abs=1e-3), pytest.approx(0.637793, abs=1e-5))
    assert lost > 2 * regret(torch.zeros(1, 3, dtype=F64)).item(), "worse than not to train at all"
    policy, lost = rest("PG, b = E[R]")
    assert (policy, lost) == (pytest.approx([0.811, 0.168, 0.021], abs=1e-3), pytest.approx(0.0148, abs=1e-4))
    assert rest("PG, b = E[R_beta]")[1] < 1e-9, "the bias is the KL that the paper's baseline leaves out"


def test_fixed_points_do_not_depend_on_who_drew(monkeypatch: pytest.MonkeyPatch) -> None:
    """CoPG's optimum is the same for any two distributions on all arms; that of PG without a baseline is not."""
    before = rest("PG, b = 0")[0]
    monkeypatch.setattr(bandit, "DRAWN_2A", torch.tensor([[0.6, 0.3, 0.1], [0.3, 0.4, 0.3]], dtype=F64))
    assert rest("CoPG")[0] == pytest.approx(BEST_A.tolist(), abs=1e-6)
    assert rest("PG, b = 0")[0] != pytest.approx(before, abs=0.1)


def test_an_arm_that_nobody_drew_keeps_its_logit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The support condition: the seen arms get their ratio, exp(1 / 0.5), and the other stays where it was."""
    monkeypatch.setattr(bandit, "DRAWN_2A", torch.tensor([[0.0, 0.5, 0.5], [0.0, 0.5, 0.5]], dtype=F64))
    logits_A = fixed_point(methods()["CoPG"])
    assert logits_A[0] == 0
    assert (logits_A[1] - logits_A[2]).exp().item() == pytest.approx(7.3891, abs=1e-4)


@pytest.mark.parametrize("name", list(methods()))
def test_training_follows_the_expected_gradient(name: str) -> None:
    """Few epochs with ten times the learning rate, two seeds: the regret goes where the fixed point says."""
    after: list[torch.Tensor] = []
    bandit.train(methods()[name], 2, 3, lambda steps, logits_SA: after.append(regret(logits_SA)), rate=1e-2)
    assert [len(after), *after[0].tolist()] == [4, *[pytest.approx(0.291867, abs=1e-6)] * 2]
    assert (after[-1] > 0.35).all() if name == "PG, b = 0" else (after[-1] < 0.24).all()
    assert after[-1][0] != after[-1][1], "each seed has pairs of its own"


def test_labels_are_bradley_terry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arm 1 against arm 2, whose rewards differ by 1: it wins sigma(1) of the time."""
    pairs_P2 = bandit.dataset(1, labelled=True)[0]
    met = pairs_P2.sort(-1).values.eq(torch.tensor([1, 2])).all(-1)
    assert (pairs_P2[met][:, 0] == 1).double().mean().item() == pytest.approx(0.731, abs=0.03)
    assert bandit.dataset(1, labelled=False)[0].double().mean(0).tolist() == pytest.approx([1.6, 1.85], abs=0.02)


def test_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One epoch of it: a row per method."""
    monkeypatch.setattr(copg_bandit, "EPOCHS", 1)
    assert copg_bandit.main(["--seeds", "2", "--longer", "2", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "copg_bandit.md").read_text()
    assert "The reference's regret is 0.2919; pi* = 0.705 0.259 0.035." in text
    assert [line.split(" | ")[0][2:] for line in text.splitlines()[4:]] == list(methods())
