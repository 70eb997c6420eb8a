"""What Relative PO and SSPO share with DPO and with one another, and how Relative PO depends on the size of a step."""

from __future__ import annotations

import math

import pytest
import torch
from heads_support import F64, change, input_from_logratios, loss_and_grad, name_of, random_input
from torch.nn.functional import logsigmoid
from torch.testing import assert_close

from po.heads.dpo import DPO
from po.heads.rpo_contrast import RPOContrast
from po.heads.rpo_contrast_unpaired import RPOContrastUnpaired
from po.heads.rpo_diagonal import RPODiagonal
from po.heads.sspo import SSPO
from po.types import Head, HeadInput

PAIRS = [[0.5, -0.75], [-1.25, 1.25], [0.6, -0.85], [30.0, -4.0]]


def pairs(values: list[list[float]]) -> HeadInput:
    x = input_from_logratios(values)
    return change(x, prompt_embedding=torch.eye(len(values), 5, dtype=F64) + 0.1)


def same(a: Head, b: Head, x: HeadInput) -> None:
    assert_close(loss_and_grad(a, x), loss_and_grad(b, x), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("head", [RPOContrast(beta=0.3), RPODiagonal(beta=0.3), RPODiagonal(0.3, 0.2)], ids=name_of)
def test_one_pair_is_dpo(head: Head) -> None:
    same(head, DPO(beta=0.3), pairs(PAIRS[:1]))


def test_the_diagonal_alone_is_dpo() -> None:
    same(RPODiagonal(beta=0.3, diagonal_weight=1.0), DPO(beta=0.3), pairs(PAIRS))


def test_one_row_of_each_kind_is_dpo() -> None:
    x = change(input_from_logratios([[0.5], [-0.75]]), label=torch.tensor([[1], [-1]]))
    x = change(x, prompt_embedding=torch.tensor([[1.0, 0.0], [0.3, 0.5]], dtype=F64))
    loss_G, grad_T = loss_and_grad(RPOContrastUnpaired(beta=0.3), x)
    dpo_G, dpo_grad_T = loss_and_grad(DPO(beta=0.3), input_from_logratios([[0.5, -0.75]]))
    assert_close(loss_G.mean(), dpo_G[0])
    assert_close(grad_T, dpo_grad_T)


def test_like_prompts_share_one_scale_between_them() -> None:
    """Equal embeddings: beta / n inside the sigmoid, for every chosen and rejected response."""
    x = change(pairs(PAIRS), prompt_embedding=torch.ones(4, 5, dtype=F64))
    same(RPOContrast(beta=0.4), RPODiagonal(beta=0.1, diagonal_weight=1 / 4), x)


def test_a_small_tau_looks_at_the_own_prompt_alone() -> None:
    """The others are left with weight 0, whose loss is log 2."""
    loss_G, _ = loss_and_grad(RPOContrast(beta=0.3, tau=1e-3), pairs(PAIRS))
    assert_close(loss_G, (DPO(beta=0.3)(input_from_logratios(PAIRS)).loss.detach() + 3 * math.log(2)) / 4)


def test_paired_and_unpaired_relative_po_agree() -> None:
    """The same responses as rows: chosen ones first."""
    x = pairs(PAIRS)
    y = input_from_logratios([[p[side]] for side in (0, 1) for p in PAIRS])
    label = torch.tensor([[1]] * 4 + [[-1]] * 4)
    y = change(y, label=label, prompt_embedding=x.prompt_embedding_GE.repeat(2, 1))
    (loss_G, grad_T), (rows_G, rows_T) = loss_and_grad(RPOContrast(), x), loss_and_grad(RPOContrastUnpaired(), y)
    assert_close(rows_G[:4], 2 * loss_G)
    assert_close(rows_T.view(2, 4).T.flatten(), grad_T)


@pytest.mark.parametrize("head", [RPOContrast(beta=0.3), RPODiagonal(beta=0.3)], ids=name_of)
def test_relative_po_does_not_pin_the_level(head: Head) -> None:
    x = pairs(PAIRS)
    loss_G, grad_T = loss_and_grad(head, x)
    assert grad_T.abs().max() > 1e-3
    assert grad_T.sum().abs() < 1e-16
    assert_close(loss_and_grad(head, change(x, ref=x.ref_T + 3.0)), (loss_G, grad_T))


@pytest.mark.parametrize("head", [RPOContrast(), RPODiagonal()], ids=name_of)
def test_a_step_is_not_the_sum_of_its_parts(head: Head) -> None:
    """What couples_batch is for: the contrast goes across the step's micro-batches."""
    assert head.needs.couples_batch
    whole_G, _ = loss_and_grad(head, pairs(PAIRS))
    halves = [
        change(pairs(PAIRS[i : i + 2]), prompt_embedding=pairs(PAIRS).prompt_embedding_GE[i : i + 2]) for i in (0, 2)
    ]
    parts_G = torch.cat([loss_and_grad(head, half)[0] for half in halves])
    assert (whole_G - parts_G).abs().max() > 1e-3


def sspo_input(head: SSPO, lengths: list[list[int]], label: list[list[int]]) -> HeadInput:
    return change(random_input(head, lengths, seed=2), label=torch.tensor(label))


def test_sspo_on_pairs_alone_is_the_length_normalised_likelihood_ratio() -> None:
    """gamma is 1 where there is nothing without labels."""
    head = SSPO(beta=2.0, gamma_0=0.1)
    x = sspo_input(head, [[3, 2], [1, 4]], [[1, -1], [1, -1]])
    r_GK = 2.0 * x.seg.mean(x.policy_T.detach())
    assert_close(loss_and_grad(head, x)[0], -logsigmoid(r_GK[:, 0] - r_GK[:, 1]))


def test_sspo_counts_unlabelled_responses_of_a_pair_s_prompt() -> None:
    """One prompt with everything is the sum of a prompt with the pair and one with the rest."""
    head = SSPO(beta=2.0, gamma_0=0.5, lam=0.0)
    x = sspo_input(head, [[3, 2, 1], [1, 4, 2]], [[1, -1, 0], [1, -1, 0]])
    y = sspo_input(head, [[3, 2], [1], [1, 4], [2]], [[1, -1], [0, 0], [1, -1], [0, 0]])
    (mixed_G, mixed_T), (apart_G, apart_T) = (loss_and_grad(head, v) for v in (x, y))
    assert_close(mixed_G.mean(), apart_G.mean())
    assert_close(mixed_T, apart_T)


def test_sspo_pushes_unlabelled_responses_away_from_the_threshold() -> None:
    head = SSPO(beta=1.0, gamma_0=0.0, bandwidth=0.2)
    x = input_from_logratios([[-1.0, -2.0], [-1.1, -0.1], [-1.9, -0.1]])  # log pi of -3, -4 | -3.1 | -3.9
    x = change(
        x, label=torch.tensor([[1, -1], [0, 1], [0, 1]]), state={k: v.double() for k, v in head.state(3).items()}
    )
    loss_G, grad_T = loss_and_grad(head, x)
    assert -4 < head(x).metrics["sspo/delta"][0] < -3
    assert grad_T[2] < 0 < grad_T[4]
    assert (grad_T[3], grad_T[5]) == (0, 0)  # good ones without a bad one do not count
    assert loss_G[1] > 0


@pytest.mark.parametrize("threshold", ["kde", "min"])
def test_sspo_s_threshold_of_separate_rewards_lies_between_them(threshold: str) -> None:
    head = SSPO(beta=1.0, threshold=threshold)  # type: ignore[arg-type]
    x = change(input_from_logratios([[5.0, -1.0], [4.0, -2.0]]), label=torch.tensor([[1, -1], [1, -1]]))
    x = change(x, policy_T=x.logratio_T.detach(), state={k: v.double() for k, v in head.state(2).items()})
    delta = head(x).metrics["sspo/delta"][0].item()
    assert delta == pytest.approx(1.5, abs=0.02) if threshold == "kde" else delta == 4.0
