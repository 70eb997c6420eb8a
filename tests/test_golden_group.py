"""Loss and gradient of CoPG and of the GRPO family against their formulas (mpmath, tests/heads_golden.py). Figures that
were computed elsewhere are in tests/test_vectors_group.py."""

from __future__ import annotations

import pytest
import torch
from heads_golden import Formula, Objective, Response, check_formula, check_objective, token_values
from heads_support import F64, Lengths, change, name_of, random_input
from mpmath import exp, mpf, sqrt

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

SETS: Lengths = ((2, 1, 3, 1), (1, 3), (2, 3, 1), (2, 2), (4,))
PAIRS: Lengths = ((2, 1), (1, 3), (4, 2), (2, 2), (3, 1), (2, 5))
GRPOS: tuple[type[Head], ...] = (GRPO, GRPOKL, DAPO, GSPO, LUSPO, CISPO)
COVERED: set[type[Head]] = {CoPG, GRPO2, DrGRPO, *GRPOS}


def copg(beta: float) -> Formula:
    b = mpf(beta)

    def loss(lp: list[Response], R: list[mpf]) -> mpf:
        d = [sum(tokens) for tokens in lp]
        pairs = [(i, j) for j in range(len(d)) for i in range(j)]
        each = [b / 2 * (d[i] - d[j]) ** 2 - (R[i] - R[j]) * (d[i] - d[j]) for i, j in pairs]
        return sum(each) / len(each) if each else mpf(0)

    return loss


@pytest.mark.parametrize("beta", [0.06, 1.5])
def test_copg_is_its_formula(beta: float) -> None:
    check_formula(CoPG(beta=beta), copg(beta))


def advantages(x: HeadInput, scale: str, eps: float) -> list[list[mpf]]:
    def of(R: list[mpf]) -> list[mpf]:
        n = len(R)
        center = [r - sum(R) / n for r in R]
        if scale == "none" or n == 1:
            return center
        std = sqrt(sum(c**2 for c in center) / (n if scale == "population" else n - 1))
        return [c / (std + mpf(eps)) for c in center]

    rows = zip(x.reward_GK.tolist(), x.seg.valid_GK.tolist(), strict=True)
    return [of([mpf(r) for r, v in zip(row, valid, strict=True) if v]) for row, valid in rows]


def surrogate(ratio: mpf, A: mpf, low: float, high: float, delta: float = 1e9) -> mpf:
    clipped = min(max(ratio, 1 - mpf(low)), 1 + mpf(high))
    return -min(min(ratio, mpf(delta)) * A, clipped * A)


def tokens_of(x: HeadInput, values: torch.Tensor) -> list[list[list[mpf]]]:
    """Numbers of tokens, as they are now, by group and response."""
    return token_values(x, [mpf(v) for v in values.tolist()])


def mean(v: list[mpf]) -> mpf:
    return sum(v) / len(v)


def clipped_tokens(head: Head, x: HeadInput) -> Objective:
    """grpo, grpo_kl, grpo2, dapo and dr_grpo."""
    low, high, delta = head.epsilon_low, head.epsilon_high, getattr(head, "delta", 1e9)
    beta = mpf(getattr(head, "beta", 0.0))
    scale = {DrGRPO: "none", GRPO2: "population"}.get(type(head)) or head.scale
    A = advantages(x, scale, getattr(head, "eps", 0.0))
    weight, old, ref = (tokens_of(x, t) for t in (x.correction_T, x.old_T, x.old_T if x.ref is None else x.ref_T))

    def losses(policy: list[mpf]) -> list[mpf]:
        out: list[mpf] = []
        for g, group in enumerate(token_values(x, policy)):
            for k, response in enumerate(group):
                given = zip(response, weight[g][k], old[g][k], ref[g][k], strict=True)
                tokens = [
                    w * surrogate(exp(p - o), A[g][k], low, high, delta) + beta * (exp(r - p) - (r - p) - 1)
                    for p, w, o, r in given
                ]
                match head:
                    case DAPO():
                        out += tokens
                    case DrGRPO():
                        out.append(sum(tokens) / head.max_completion_length)
                    case _:
                        out.append(mean(tokens))
        return out

    return losses


def sequences(head: Head, x: HeadInput) -> Objective:
    """gspo and luspo."""
    A, weight, old = advantages(x, head.scale, head.eps), tokens_of(x, x.correction_T), tokens_of(x, x.old_T)

    def losses(policy: list[mpf]) -> list[mpf]:
        out: list[mpf] = []
        for g, group in enumerate(token_values(x, policy)):
            for k, response in enumerate(group):
                ratio = exp((sum(response) - sum(old[g][k])) / len(response))
                share = sum(weight[g][k]) if isinstance(head, LUSPO) else mean(weight[g][k])
                out.append(share * surrogate(ratio, A[g][k], head.epsilon_low, head.epsilon_high))
        return out

    return losses


def cispo(head: CISPO, x: HeadInput) -> Objective:
    A = [a for group in advantages(x, head.scale, head.eps) for a in group]
    owner = [i for i, n in enumerate(n for group in x.seg.length_GK.tolist() for n in group if n) for _ in range(n)]
    low, high = 1 - mpf(head.epsilon_low), 1 + mpf(head.epsilon_high)
    now = zip(x.policy_T.tolist(), x.old_T.tolist(), x.correction_T.tolist(), owner, strict=True)
    weight = [mpf(c) * min(max(exp(mpf(p) - mpf(o)), low), high) * A[i] for p, o, c, i in now]
    return lambda policy: [-w * p for w, p in zip(weight, policy, strict=True)]


OPTIONS = ({}, {"scale": "population"}, {"scale": "none"}, {"eps": 1e-4}, {"eps": 1e-6, "scale": "population"})
CASES: list[Head] = [cls(**options) for cls in GRPOS for options in OPTIONS]
CASES += [cls(delta=2.0) for cls in (GRPO, GRPOKL, DAPO, DrGRPO)] + [GRPO(epsilon_low=0.6, epsilon_high=1.5)]
CASES += [GRPO2(), GRPO2(epsilon_high=0.2), GRPOKL(beta=0.7), DrGRPO(), DrGRPO(max_completion_length=6)]
CASES += [GSPO(epsilon_low=0.2, epsilon_high=0.3), LUSPO(epsilon_low=0.2, epsilon_high=0.3), DAPO(epsilon_low=0.4)]
PEERS_CLAMPS = {  # TRL's epsilon_high 5, verl's clip_ratio_low and _high, open-instruct's clip_higher
    "trl": CISPO(epsilon_high=5.0 - 1),
    "verl": CISPO(epsilon_low=0.2, epsilon_high=0.28),
    "open_instruct": CISPO(epsilon_high=0.272),
}
CASES += PEERS_CLAMPS.values()


@pytest.mark.parametrize("head", CASES, ids=name_of)
def test_grpo_family_is_its_formula(head: Head) -> None:
    x = random_input(head, PAIRS if isinstance(head, GRPO2) else SETS, seed=3)
    x = change(x, policy_T=(x.old_T + 2 * (x.policy_T.detach() - x.old_T)).requires_grad_(True))
    if head.needs.reference:
        x = change(x, ref=x.ref_T + torch.linspace(-1, 1, x.policy_T.numel(), dtype=F64))
    formula = {GSPO: sequences, LUSPO: sequences, CISPO: cispo}.get(type(head), clipped_tokens)
    check_objective(head, formula(head, x), x)
    clipped = {name.partition("/")[2]: bool(v.any()) for name, v in head(x).metrics.items() if "/clip_" in name}
    assert clipped == {"clip_low": head.epsilon_low < 1, "clip_high": True}
