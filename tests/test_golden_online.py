"""Loss and gradient of the policy-gradient heads beyond the GRPO family against their formulas (mpmath,
tests/heads_golden.py). Figures that were computed elsewhere: tests/test_vectors_online.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from heads_golden import Objective, Response, check_objective, sigmoid, token_values
from heads_support import F64, Lengths, change, name_of, parts, random_input
from mpmath import exp, log, mp, mpf, sqrt
from torch import Tensor
from torch.testing import assert_close

from po.heads.bcpg_nsa import BCPGNSA
from po.heads.capo import CAPO
from po.heads.gcpo_gold import GCPOGold
from po.heads.nft import NFT
from po.heads.ppo import PPO
from po.heads.reinforce_pp import ReinforcePP
from po.heads.rloo import RLOO
from po.heads.rloo_ref_free import RLOORefFree
from po.heads.sapo import SAPO
from po.heads.vespo import VESPO
from po.types import Head, HeadInput

COVERED: set[type[Head]] = {SAPO, VESPO, RLOO, RLOORefFree, ReinforcePP, PPO, NFT, CAPO, GCPOGold, BCPGNSA}
SETS: Lengths = ((2, 1, 3, 1), (1, 3), (2, 1, 1), (2,))
Numbers = list[list[mpf]]  # of responses: [g][k]
Tokens = list[list[Response]]  # [g][k][i]
Term = Callable[[int, int, Response], list[mpf]]  # group, response, its log-probs -> losses of its units


def tokens(x: HeadInput, t: Tensor) -> Tokens:
    return token_values(x, [mpf(v) for v in t.tolist()])


def responses(x: HeadInput, t_GK: Tensor) -> Numbers:
    valid = x.seg.valid_GK.tolist()
    return [[mpf(v) for v, ok in zip(row, oks) if ok] for row, oks in zip(t_GK.tolist(), valid)]


def each(x: HeadInput, term: Term) -> Objective:
    def losses(policy: list[mpf]) -> list[mpf]:
        found = token_values(x, policy)
        return [v for g, group in enumerate(found) for k, lp in enumerate(group) for v in term(g, k, lp)]

    return losses


def mean(values: list[mpf]) -> mpf:
    return sum(values) / len(values)


def advantages(rewards: Numbers, scale: str, eps: float = 0.0) -> Numbers:
    """Rewards less the group's mean, over its deviation; 0 where there is none."""
    out = []
    for row in rewards:
        squares = sum((r - mean(row)) ** 2 for r in row)
        n = len(row) - (scale == "unbiased")
        by = mpf(1) if scale == "none" else sqrt(squares / n) + mpf(eps) if squares > 0 else mpf(1)
        out.append([(r - mean(row)) / by for r in row])
    return out


def clipped(ratio: mpf, A: mpf, head: Head) -> mpf:
    low, high = 1 - mpf(head.epsilon_low), 1 + mpf(head.epsilon_high)
    return -min(ratio * A, min(max(ratio, low), high) * A)


def given(head: Head, same: bool = False) -> HeadInput:
    """Random ragged groups; reference and sampler differ."""
    x = random_input(head, SETS, seed=3, same=same)
    if x.ref is None or x.old is None:
        return x
    return change(x, ref=x.old_T + torch.linspace(-0.9, 1.3, x.policy_T.numel(), dtype=F64).sin())


def check(head: Head, formula: Callable[[Head, HeadInput], Term]) -> None:
    """On random ragged groups whose ratios are far from 1, and at policy == sampler."""
    for same in (False, True):
        x = given(head, same)
        with mp.workdps(50):
            objective = each(x, formula(head, x))
        check_objective(head, objective, x)


def sapo(head: SAPO, x: HeadInput) -> Term:
    A = advantages(responses(x, x.reward_GK), head.scale, head.eps)
    old, c = tokens(x, x.old_T), tokens(x, x.correction_T)

    def term(g: int, k: int, lp: Response) -> list[mpf]:
        tau = mpf(head.tau_pos if A[g][k] > 0 else head.tau_neg)
        gates = [4 / tau * sigmoid(tau * (exp(p - o) - 1)) for p, o in zip(lp, old[g][k])]
        return [mean([-w * gate * A[g][k] for w, gate in zip(c[g][k], gates)])]

    return term


SCALES = [{}, {"scale": "population"}, {"scale": "none"}, {"eps": 0.3}]


@pytest.mark.parametrize("options", [*SCALES, {"tau_pos": 0.5, "tau_neg": 3.0}])
def test_sapo_is_its_formula(options: dict) -> None:
    check(SAPO(**options), sapo)


def vespo(head: VESPO, x: HeadInput) -> Term:
    A, c = advantages(responses(x, x.reward_GK), head.scale, head.eps), tokens(x, x.correction_T)
    change_of = tokens(x, x.policy_T - x.old_T)

    def term(g: int, k: int, lp: Response) -> list[mpf]:
        good = A[g][k] >= 0
        power, rate = (mpf(v) for v in ((head.k_pos, head.lambda_pos) if good else (head.k_neg, head.lambda_neg)))
        w = exp(sum(change_of[g][k]))
        return [-(w**power) * exp(rate * (1 - w)) * A[g][k] * p * m for p, m in zip(lp, c[g][k])]

    return term


@pytest.mark.parametrize(
    "options", [*SCALES, {"k_pos": 0.5, "lambda_pos": 0.3}, {"k_neg": 1.1, "lambda_neg": 0.7}], ids=str
)
def test_vespo_is_its_formula(options: dict) -> None:
    check(VESPO(**options), vespo)


def others_mean(row: list[mpf], i: int) -> mpf:
    return (sum(row) - row[i]) / (len(row) - 1) if len(row) > 1 else mpf(0)


def rloo(head: RLOO | RLOORefFree, x: HeadInput) -> Term:
    R, old, c = responses(x, x.reward_GK), tokens(x, x.old_T), tokens(x, x.correction_T)
    if isinstance(head, RLOO):
        kl = tokens(x, x.old_T - x.ref_T)
        R = [[r - mpf(head.beta) * sum(kl[g][k]) for k, r in enumerate(row)] for g, row in enumerate(R)]

    def term(g: int, k: int, lp: Response) -> list[mpf]:
        A = R[g][k] - others_mean(R[g], k)
        return [mean(c[g][k]) * clipped(exp(sum(lp) - sum(old[g][k])), A, head)]

    return term


@pytest.mark.parametrize(
    "head",
    [
        RLOO(),
        RLOO(beta=2.0),
        RLOO(beta=0.0),
        RLOO(epsilon_low=0.9),
        RLOO(epsilon_high=5.0),
        RLOORefFree(),
        RLOORefFree(epsilon_low=0.9, epsilon_high=5.0),
    ],
    ids=name_of,
)
def test_rloo_is_its_formula(head: Head) -> None:
    check(head, rloo)


def flat(values: Tokens) -> list[mpf]:
    return [v for group in values for response in group for v in response]


def whitened(values: Tokens, unbiased: bool) -> Tokens:
    every = flat(values)
    var = sum((v - mean(every)) ** 2 for v in every) / (len(every) - unbiased)
    return [[[(v - mean(every)) / sqrt(var) for v in response] for response in group] for group in values]


def reinforce_pp(head: ReinforcePP, x: HeadInput) -> Term:
    score = responses(x, x.reward_GK)
    if head.baseline == "group":
        score = [[r - mean(row) for r in row] for row in score]
    kl, old, c = tokens(x, x.old_T - x.ref_T), tokens(x, x.old_T), tokens(x, x.correction_T)
    returns = [
        [[score[g][k] - mpf(head.beta) * sum(kls[t:]) for t in range(len(kls))] for k, kls in enumerate(group)]
        for g, group in enumerate(kl)
    ]
    A = whitened(returns, head.variance == "unbiased")

    def term(g: int, k: int, lp: Response) -> list[mpf]:
        return [w * clipped(exp(p - o), a, head) for w, p, o, a in zip(c[g][k], lp, old[g][k], A[g][k])]

    return term


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta": 2.0},
        {"beta": 0.0},
        {"baseline": "group"},
        {"variance": "unbiased"},
        {"epsilon_low": 0.5},
        {"epsilon_high": 2.0},
    ],
    ids=str,
)
def test_reinforce_pp_is_its_formula(options: dict) -> None:
    check(ReinforcePP(**options), reinforce_pp)


def gae(head: PPO, x: HeadInput) -> tuple[Tokens, Tokens]:
    """Advantages and returns, by the textbook's backward loop."""
    R, kl, U = responses(x, x.reward_GK), tokens(x, x.old_T - x.ref_T), tokens(x, x.old_gate_T("value"))
    A: Tokens = [[[] for _ in group] for group in kl]
    for g, group in enumerate(kl):
        for k, kls in enumerate(group):
            ahead, following = mpf(0), mpf(0)
            for t in reversed(range(len(kls))):
                r = -mpf(head.beta) * kls[t] + (R[g][k] if t == len(kls) - 1 else 0)
                ahead = r + mpf(head.gamma) * following - U[g][k][t] + mpf(head.gamma) * mpf(head.lam) * ahead
                following = U[g][k][t]
                A[g][k].insert(0, ahead)
    returns = [[[a + u for a, u in zip(A[g][k], U[g][k])] for k in range(len(A[g]))] for g in range(len(A))]
    return (whitened(A, True) if head.whiten else A), returns


def ppo(head: PPO, x: HeadInput, value_T: Tensor | list[mpf] | None = None) -> Term:
    A, R = gae(head, x)
    old, c, U = tokens(x, x.old_T), tokens(x, x.correction_T), tokens(x, x.old_gate_T("value"))
    V = tokens(x, x.gate_T("value")) if value_T is None else token_values(x, value_T)
    e = mpf(head.epsilon_value)

    def term(g: int, k: int, lp: Response) -> list[mpf]:
        out = []
        for p, o, w, a, v, u, r in zip(lp, old[g][k], c[g][k], A[g][k], V[g][k], U[g][k], R[g][k]):
            policy = clipped(exp(p - o), a, head)
            if head.dual_clip and a < 0:
                policy = min(policy, -mpf(head.c) * a)
            near = u + min(max(v - u, -e), e)
            out.append(w * policy + mpf(head.vf_coef) * max((v - r) ** 2, (near - r) ** 2) / 2)
        return out

    return term


PPOS = [
    PPO(),
    PPO(beta=2.0),
    PPO(epsilon_low=0.5),
    PPO(epsilon_high=2.0),
    PPO(gamma=0.9),
    PPO(lam=0.3),
    PPO(lam=0.0),
    PPO(whiten=False),
    PPO(vf_coef=2.0),
    PPO(epsilon_value=1.5),
    PPO(dual_clip=True),
    PPO(dual_clip=True, c=1.5),
]


@pytest.mark.parametrize("head", PPOS, ids=name_of)
def test_ppo_is_its_formula(head: PPO) -> None:
    check(head, ppo)


@pytest.mark.parametrize("head", PPOS, ids=name_of)
def test_the_gradient_of_ppo_s_value(head: PPO) -> None:
    x = given(head)
    value_T = x.gate_T("value").detach().add(torch.linspace(-1, 1, x.policy_T.numel(), dtype=F64)).requires_grad_(True)
    x = change(x, gates={"value": value_T})
    (grad_T,) = torch.autograd.grad(parts(head, x).loss, value_T)
    with mp.workdps(50):
        policy, values, step = ([mpf(v) for v in t.tolist()] for t in (x.policy_T, value_T, torch.tensor([1e-20])))

        def total(v: list[mpf]) -> mpf:
            return mean(each(x, ppo(head, x, v))(policy))

        expected = []
        for t in range(len(values)):
            up, down = (total([*values[:t], values[t] + d, *values[t + 1 :]]) for d in (step[0], -step[0]))
            expected.append(float((up - down) / (2 * step[0])))
    assert_close(grad_T, torch.tensor(expected, dtype=F64))


def nft(head: NFT, x: HeadInput) -> Term:
    right = [[r > 0 for r in row] for row in responses(x, x.reward_GK)]
    old, now, c = tokens(x, x.old_T), tokens(x, x.policy_T), tokens(x, x.correction_T)
    e = mpf(head.epsilon)

    def term(g: int, k: int, lp: Response) -> list[mpf]:
        q = mpf(sum(right[g])) / len(right[g])
        if q in (0, 1):
            return [mpf(0) for _ in lp]
        omega = {"linear": 1 - q, "sqrt": sqrt((1 - q) / q), "none": mpf(1)}[head.omega]
        out = []
        for p, here, o, w in zip(lp, now[g][k], old[g][k], c[g][k]):
            rest, constant = ((1 - q * exp(v - o)) / (1 - q) for v in (p, here))
            straight = rest + (max(constant, e) - constant)
            out.append(-w * omega * ((p - o) if right[g][k] else mpf(head.neg_weight) * log(straight)))
        return out

    return term


@pytest.mark.parametrize(
    "options", [{}, {"omega": "sqrt"}, {"omega": "none"}, {"epsilon": 0.01}, {"epsilon": 2.5}, {"neg_weight": 0.5}],
    ids=str,
)  # fmt: skip
def test_nft_is_its_formula(options: dict) -> None:
    check(NFT(**options), nft)
    rates = set(NFT()(given(NFT())).metrics["nft/right"].tolist())
    assert rates & {0.0, 1.0}, "no group that is all right or all wrong"
    assert rates - {0.0, 1.0}, "no group with both"


def capo(head: CAPO, x: HeadInput) -> Term:
    A = advantages(responses(x, x.reward_GK), head.scale, head.eps)
    old, c = tokens(x, x.old_T), tokens(x, x.correction_T)
    first = float(x.share_done) < head.phase

    def term(g: int, k: int, lp: Response) -> list[mpf]:
        if first and A[g][k] < 0:
            return [mpf(0)]
        return [mean([w * clipped(exp(p - o), A[g][k], head) for w, p, o in zip(c[g][k], lp, old[g][k])])]

    return term


@pytest.mark.parametrize(
    "options", [*SCALES, {"phase": 0.05}, {"phase": 0.0}, {"phase": 1.0}, {"epsilon_low": 0.9}, {"epsilon_high": 5.0}],
    ids=str,
)  # fmt: skip
def test_capo_is_its_formula(options: dict) -> None:
    check(CAPO(**options), capo)


def gcpo_gold(head: GCPOGold, x: HeadInput) -> Term:
    A, old, c = advantages(responses(x, x.reward_GK), head.scale), tokens(x, x.old_T), tokens(x, x.correction_T)
    gold, now = responses(x, x.response_column_GK("gold")), tokens(x, x.policy_T)
    assert {v for row in gold for v in row} == {0, 1}

    def term(g: int, k: int, lp: Response) -> list[mpf]:
        base = now[g][k] if gold[g][k] else old[g][k]
        return [mean(c[g][k]) * clipped(exp(mean(lp) - mean(base)), A[g][k], head)]

    return term


@pytest.mark.parametrize(
    "options",
    [{}, {"scale": "unbiased"}, {"scale": "none"}, {"epsilon_low": 0.9}, {"epsilon_high": 5.0}],
    ids=str,
)
def test_gcpo_gold_is_its_formula(options: dict) -> None:
    check(GCPOGold(**options), gcpo_gold)


def bcpg_nsa(head: BCPGNSA, x: HeadInput) -> Term:
    R, kl = responses(x, x.reward_GK), tokens(x, x.policy_T - x.ref_T)
    step = tokens(x, x.token_column_T("correct_step"))

    def term(g: int, k: int, lp: Response) -> list[mpf]:
        above = R[g][k] - mean(R[g])
        weight = above - mpf(head.tau) * mean(kl[g][k])
        saved = max(weight, 0) + mpf(head.lam) * min(weight, 0) + mpf(head.delta)
        return [mean([-(saved if above < 0 and s else weight) * p for p, s in zip(lp, step[g][k])])]

    return term


@pytest.mark.parametrize(
    "options", [{}, {"tau": 2.0}, {"lam": 0.5}, {"lam": -0.5}, {"delta": 0.4}, {"lam": 1.0, "delta": 0.4}], ids=str
)
def test_bcpg_nsa_is_its_formula(options: dict) -> None:
    check(BCPGNSA(**options), bcpg_nsa)
