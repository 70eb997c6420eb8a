"""Self-distillation, distillation to stored distributions and exploration: loss and gradient, for all that carries
one, against the formulas in mpmath, against figures that were computed elsewhere, and against TRL where it is."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from heads_golden import RAGGED, from_sums, sigmoid, token_values
from heads_support import F64, Lengths, change, loss_and_grad, name_of, parts, random_input, segments
from mpmath import exp, log, mp, mpf, sqrt
from torch import Tensor
from torch.testing import assert_close

from po.heads.gjsd import GJSD
from po.heads.hindsight import Hindsight
from po.heads.hindsight_online import HindsightOnline
from po.heads.opsd import OPSD
from po.heads.pi_distill import PiDistill
from po.heads.rltf_sd import RLTFSD
from po.heads.sdft import SDFT
from po.heads.unisd import UniSD
from po.heads.xpo import XPO
from po.objective import counted, scope
from po.types import Head, HeadInput

COVERED: set[type[Head]] = {Hindsight, HindsightOnline, OPSD, PiDistill, RLTFSD, SDFT, UniSD, GJSD, XPO}

ONE: Lengths = ((3,), (1,), (5,), (2,), (1,), (4,))  # one response a row
SETS: Lengths = ((2, 1, 3, 1), (1, 3), (2, 1, 1), (2,))
Tokens = dict[str, list]  # name -> numbers of a response's tokens
Formula = Callable[[int, int, Tokens, Tokens], mpf]  # group, response, what is differentiated, the same as constants
FIELDS = {"policy": "policy_T", "privileged": "privileged", "candidate": "candidate"}


def named(x: HeadInput) -> dict[str, Tensor]:
    single = {"policy": x.policy_T, "privileged": x.privileged, "old": x.old, "ref": x.ref, "candidate": x.candidate}
    single |= {"teacher": x.teacher, "correction": x.correction, **x.token_columns}
    return {k: t for k, t in single.items() if t is not None}


def numbers(t: Tensor) -> list:
    return [[mpf(v) for v in row] for row in t.tolist()] if t.dim() == 2 else [mpf(v) for v in t.tolist()]


def counting(x: HeadInput, unit: str, mask: Tensor) -> list[tuple[int, int]]:
    """Group and response of the units that count; (g, 0) for groups, and once per response for tokens."""
    if unit == "group":
        return [(g, 0) for g in range(len(mask)) if mask[g]]
    K = x.seg.valid_GK.shape[1]
    slots = x.seg.slot_T[mask].unique() if unit == "token" else mask.flatten().nonzero()[:, 0]
    return [(s // K, s % K) for s in slots.tolist()]


def check(head: Head, x: HeadInput, formula: Formula, *carry: str) -> None:
    """The losses of the units that count, and the gradient of their mean for each tensor in `carry`. Of tokens the
    formula is the sum over a response; of pairs it reads both responses."""
    leaf = {k: named(x)[k].detach().clone().requires_grad_(True) for k in carry}
    out = parts(head, change(x, **{FIELDS[k]: t for k, t in leaf.items()}))
    found = torch.autograd.grad(out.loss, list(leaf.values()))
    unit, mask = head.needs.unit, counted(x, scope(head.needs))
    pick = counting(x, unit, mask)
    step = mpf(10) ** -20
    with mp.workdps(50):
        values = {k: numbers(t) for k, t in named(x).items()}

        def tokens(at: dict[str, list], g: int, k: int) -> Tokens:
            of_g = {name: token_values(x, v)[g] for name, v in at.items()}
            return of_g if unit == "group" else {name: v[k] for name, v in of_g.items()}

        def losses(at: dict[str, list]) -> list[mpf]:
            return [formula(g, k, tokens(at, g, k), tokens(values, g, k)) for g, k in pick]

        def derivative(name: str, t: int, m: int | None) -> float:
            moved = []
            for d in (step, -step):
                v = list(values[name])
                v[t] = v[t] + d if m is None else [*v[t][:m], v[t][m] + d, *v[t][m + 1 :]]
                moved.append(sum(losses({**values, name: v})))
            return float((moved[0] - moved[1]) / (2 * step) / int(mask.sum()))

        loss = out.outputs[0].loss.detach()
        loss = torch.stack([x.seg.sum(loss)[g, k] for g, k in pick]) if unit == "token" else loss[mask]
        assert_close(loss, torch.tensor([float(v) for v in losses(values)], dtype=F64))
        for (name, t), grad in zip(leaf.items(), found, strict=True):
            width = [None] if t.dim() == 1 else range(t.shape[1])
            want = [[derivative(name, i, m) for m in width] for i in range(t.shape[0])]
            assert_close(grad, torch.tensor(want, dtype=F64).view(t.shape), msg=lambda m, n=name: f"{n}: {m}")


def mean(xs: list) -> mpf:
    return sum(xs, mpf(0)) / len(xs)


def minus(a: list, b: list) -> list:
    return [u - v for u, v in zip(a, b, strict=True)]


def dot(*lists: list) -> mpf:
    return sum((math.prod(row) for row in zip(*lists, strict=True)), mpf(0))


def clip(v: mpf, low: float, high: float) -> mpf:
    return min(max(v, mpf(low)), mpf(high))


def surrogate(r: mpf, A: mpf, e: float) -> mpf:
    return -min(r * A, clip(r, 1 - mpf(e), 1 + mpf(e)) * A)


# Self-distillation on tokens.


@pytest.mark.parametrize("layout", [ONE, SETS], ids=["one", "best of several"])
@pytest.mark.parametrize(
    "head", [Hindsight(), Hindsight(center=True), Hindsight(ignore_first_k=2), Hindsight(True, 1)], ids=name_of
)
def test_hindsight_is_its_formula(head: Hindsight, layout: Lengths) -> None:
    def loss(g: int, k: int, v: Tokens, held: Tokens) -> mpf:
        d = minus(held["privileged"], held["policy"])[head.ignore_first_k :]
        if not d:
            return mpf(0)
        center = mean(d) if head.center else mpf(0)
        return -mean([(s - center) * p for s, p in zip(d, v["policy"][head.ignore_first_k :], strict=True)])

    check(head, random_input(head, layout, seed=3), loss, "policy")


@pytest.mark.parametrize("head", [HindsightOnline(), HindsightOnline(epsilon=0.6)], ids=name_of)
def test_hindsight_online_is_its_formula(head: HindsightOnline) -> None:
    def loss(g: int, k: int, v: Tokens, held: Tokens) -> mpf:
        d = minus(held["privileged"], held["policy"])
        ratio = [exp(u) for u in minus(v["policy"], v["old"])]
        each = [surrogate(r, s - mean(d), head.epsilon) for r, s in zip(ratio, d, strict=True)]
        return mean([c * u for c, u in zip(v["correction"], each, strict=True)])

    check(head, random_input(head, ONE, seed=3), loss, "policy")


@pytest.mark.parametrize("head", [SDFT(), SDFT(clip=0.3)], ids=name_of)
def test_sdft_is_its_formula(head: SDFT) -> None:
    def loss(g: int, k: int, v: Tokens, held: Tokens) -> mpf:
        weight = [min(exp(u), mpf(head.clip)) for u in minus(held["policy"], held["old"])]
        return dot(v["correction"], weight, minus(held["policy"], held["privileged"]), v["policy"]) / len(weight)

    check(head, random_input(head, SETS, seed=3), loss, "policy")


UNISD = [
    UniSD(),
    UniSD(gamma=0.0),
    UniSD(gamma=3.0, q95=0.2, clip=0.5),
    UniSD(q95=0.1),  # at the cap
    UniSD(gamma=200.0, q95=0.1),  # at the floor
    UniSD(divergence="reverse", clip=0.7),
    UniSD(granularity="sequence"),
    UniSD(gamma=3.0, granularity="sequence", normalizer="length"),
    UniSD(gamma=40.0, granularity="sequence", normalizer="length"),  # at the floor
    UniSD(normalizer="length"),
]


@pytest.mark.parametrize("head", UNISD, ids=name_of)
def test_unisd_is_its_formula(head: UniSD) -> None:
    x = random_input(head, ONE, seed=3)
    x = change(x, token_columns={"spread": torch.linspace(0.05, 1.5, x.policy_T.numel(), dtype=F64)})

    def loss(g: int, k: int, v: Tokens, held: Tokens) -> mpf:
        gap = minus(held["privileged"], held["policy"])
        c, gamma, n = mpf(head.clip), mpf(head.gamma), len(gap)
        pull = [min(exp(u), c) if head.divergence == "forward" else clip(u, -c, c) for u in gap]
        if head.granularity == "token":
            w = [max(1 / (1 + gamma * min(s / mpf(head.q95), mpf(10))), mpf(0.01)) for s in v["spread"]]
        else:
            w = [max(exp(-gamma * mean(v["spread"])), mpf(1e-6))] * n
        total = max(sum(w), mpf(1)) if head.normalizer == "weights" else n
        return -dot(w, pull, v["policy"]) / total

    check(head, x, loss, "policy")


# Policy gradient with privileged information.


def advantages(x: HeadInput, scale: str) -> list[list[mpf]]:
    out = []
    for rewards, valid in zip(x.reward_GK.tolist(), x.seg.valid_GK.tolist(), strict=True):
        R = [mpf(r) for r, v in zip(rewards, valid, strict=True) if v]
        center, n = [r - mean(R) for r in R], len(R)
        var = sum(c * c for c in center) / (n if scale == "population" else max(n - 1, 1))
        out.append([c / (sqrt(var) if var and scale != "none" else 1) for c in center])
    return out


@pytest.mark.parametrize("scale", ["unbiased", "population", "none"])
@pytest.mark.parametrize("close", [True, False], ids=["near the sampler", "far from it"])
def test_opsd_is_its_formula(close: bool, scale: str) -> None:
    head = OPSD(beta=0.3, epsilon=0.3, scale=scale)
    x = random_input(head, SETS, seed=3)
    x = change(x, old=x.policy_T.detach() + (0.05 if close else 0.5) * (x.old_T - x.policy_T.detach()))
    A = advantages(x, scale)

    def loss(g: int, k: int, v: Tokens, held: Tokens) -> mpf:
        gain = surrogate(exp(sum(minus(v["policy"], v["old"]))), A[g][k], head.epsilon)
        gap = minus(held["policy"], held["privileged"])
        each = [gain + mpf(head.beta) * d * p for d, p in zip(gap, v["policy"], strict=True)]
        return mean([c * u for c, u in zip(v["correction"], each, strict=True)])

    check(head, x, loss, "policy")


@pytest.mark.parametrize(
    "head",
    [
        PiDistill(),
        PiDistill(beta=0.0, epsilon=0.4, scale="population"),
        PiDistill(alpha=0.3, scale="none"),
        PiDistill(alpha=1.0),
        PiDistill(alpha=0.0, epsilon=0.6),
    ],
    ids=name_of,
)
def test_pi_distill_is_its_formula(head: PiDistill) -> None:
    x = random_input(head, SETS, seed=3)
    near = torch.linspace(-0.2, 0.2, x.policy_T.numel(), dtype=F64)
    x = change(x, old=x.privileged_T + near)  # a teacher a few steps ago
    A = advantages(x, head.scale)

    def loss(g: int, k: int, v: Tokens, held: Tokens) -> mpf:
        a, b = mpf(head.alpha), mpf(head.beta)
        gain = [surrogate(exp(sum(minus(v[p], v["old"]))), A[g][k], head.epsilon) for p in ("privileged", "policy")]
        each = []
        for t, s, t0, s0 in zip(v["privileged"], v["policy"], held["privileged"], held["policy"], strict=True):
            each.append(a * (gain[0] + b * (t0 - s0) * t) + (1 - a) * (gain[1] + b * (t0 - s)))
        return mean([c * u for c, u in zip(v["correction"], each, strict=True)])

    check(head, x, loss, "policy", "privileged")


@pytest.mark.parametrize(
    "head", [RLTFSD(), RLTFSD(rl_coef=0.1), RLTFSD(min_prob=0.3), RLTFSD(min_prob=math.exp(-5))], ids=name_of
)
def test_rltf_sd_is_its_formula(head: RLTFSD) -> None:
    x = random_input(head, SETS, seed=3)
    first = x.response_column_GK("first_reward").tolist()

    def loss(g: int, k: int, v: Tokens, held: Tokens) -> mpf:
        r0 = mean([mpf(r) for r in first[g] if not math.isnan(r)])
        kept = [p for p, now in zip(v["policy"], held["policy"], strict=True) if exp(now) >= head.min_prob]
        return -mpf(head.rl_coef) * (mpf(x.reward_GK[g, k].item()) - r0) * sum(kept, mpf(0))

    check(head, x, loss, "policy")


# Exploration, and distributions.


@pytest.mark.parametrize("head", [XPO(), XPO(beta=0.5, alpha=0.3), XPO(alpha=0.0)], ids=name_of)
def test_xpo_is_its_formula(head: XPO) -> None:
    x = random_input(head, RAGGED["pair"], seed=3)
    x = change(x, response_columns={"from_reference": torch.tensor([[1, 0], [0, 1], [0, 0], [1, 1]], dtype=F64)})
    flags = x.response_column_GK("from_reference").tolist()

    def loss(g: int, k: int, v: dict, held: dict) -> mpf:
        h = sum(minus(v["policy"][0], v["ref"][0])) - sum(minus(v["policy"][1], v["ref"][1]))
        own = sum(mpf(f) * sum(lp) for f, lp in zip(flags[g], v["policy"], strict=True))
        return -log(sigmoid(mpf(head.beta) * h)) + mpf(head.alpha) * own

    check(head, x, loss, "policy")


def stored(M: int, full: bool) -> HeadInput:
    """Distributions over five tokens of which M are stored; the last response's first position has one fewer."""
    x = random_input(GJSD(), ONE, seed=3)
    rng = torch.Generator().manual_seed(5)
    both = [torch.randn(x.policy_T.numel(), M if full else M + 2, generator=rng, dtype=F64) for _ in range(2)]
    teacher, candidate = (t.log_softmax(-1)[:, :M].clone() for t in both)
    if not full:
        teacher[12, -1], candidate[12, -1] = -torch.inf, 0
    return change(x, teacher=teacher, candidate=candidate)


def kl(p: list[mpf], q: list[mpf]) -> mpf:
    return sum(u * (log(u) - log(v)) for u, v in zip(p, q, strict=True))


@pytest.mark.parametrize("full", [False, True], ids=["others", "all stored"])
@pytest.mark.parametrize("head", [GJSD(), GJSD(beta=0.0), GJSD(beta=1.0), GJSD(beta=0.2, sft=0.5)], ids=name_of)
def test_gjsd_is_its_formula(head: GJSD, full: bool) -> None:
    def loss(g: int, k: int, v: Tokens, held: Tokens) -> mpf:
        total, b = mpf(0), mpf(head.beta)
        for teacher, student, text in zip(v["teacher"], v["candidate"], v["policy"], strict=True):
            known = [m for m, t in enumerate(teacher) if t > -mp.inf]
            p, q = ([exp(side[m]) for m in known] for side in (teacher, student))
            if not full:
                p, q = [*p, 1 - sum(p)], [*q, 1 - sum(q)]
            m = [b * u + (1 - b) * w for u, w in zip(p, q, strict=True)]
            total += kl(p, q) if b == 0 else kl(q, p) if b == 1 else b * kl(p, m) + (1 - b) * kl(q, m)
            total -= mpf(head.sft) * text
        return total

    check(head, stored(3, full), loss, "candidate", "policy")


# Figures of an independent float64 script, to 6 decimals. Inputs of the hindsight vectors are inferred from their
# gradients; their losses are not.
LOGP = [[-1, -0.5, -2, -0.3], [-0.7, -1.2, -0.9], [-0.4, -1.5], [-2.2, -0.1, -0.6, -1.1]]
SIGNAL = [[0.5, -0.2, 0.1, 0.3], [-0.4, 0.2, 0.6], [0.1, 0.1], [-0.3, 0.2, 0.0, 0.4]]
TEACHER = [[-0.8, -0.9, -1, -0.2], [-1, -1, -1], [-0.4, -1.1], [-1.9, -0.3, -0.6, -1]]
CENTERED = [-0.020313, 0.023438, 0.004687, -0.007812, 0.044444, -0.005556, -0.038889, 0, 0, 0.023438, -0.007812]
CENTERED += [0.004688, -0.020313]
PLAIN = [-0.03125, 0.0125, -0.00625, -0.01875, 0.033333, -0.016667, -0.05, -0.0125, -0.0125, 0.01875, -0.0125, 0]
PLAIN += [-0.025]
SAMPLED = [-0.015385, 0.030769, -0.076923, -0.007692, 0.023077, -0.015385, 0.007692, 0, -0.030769, -0.023077]
SAMPLED += [0.015385, 0, -0.007692]


def flat(rows: list[list[float]]) -> Tensor:
    return torch.tensor([v for row in rows for v in row], dtype=F64)


def hindsight_input() -> HeadInput:
    policy_T = flat(LOGP).requires_grad_(True)
    ones = torch.ones(13, dtype=F64)
    privileged_T = flat(LOGP) + flat(SIGNAL)
    seg = segments([[len(row)] for row in LOGP])
    return HeadInput(seg, policy_T, old=flat(LOGP), privileged=privileged_T, correction=ones)


@pytest.mark.parametrize(
    ("head", "loss", "grad"),
    [(Hindsight(), 0.096042, PLAIN), (Hindsight(center=True), -0.019132, CENTERED)],
    ids=["plain", "centred"],
)
def test_hindsight_vectors(head: Head, loss: float, grad: list[float]) -> None:
    loss_GK, grad_T = loss_and_grad(head, hindsight_input())
    assert loss_GK.mean().item() == pytest.approx(loss, abs=6e-7)
    assert_close(grad_T, torch.tensor(grad, dtype=F64), rtol=0, atol=6e-7)


def test_hindsight_online_at_the_sampler_has_the_centred_gradient() -> None:
    loss_GK, grad_T = loss_and_grad(HindsightOnline(), hindsight_input())
    assert_close(grad_T, torch.tensor(CENTERED, dtype=F64), rtol=0, atol=6e-7)
    assert_close(loss_GK, torch.zeros(4, 1, dtype=F64))


def sdft_input() -> HeadInput:
    policy_T = flat(LOGP).requires_grad_(True)
    seg = segments([[len(row) for row in LOGP]])
    return HeadInput(seg, policy_T, old=flat(LOGP), privileged=flat(TEACHER), correction=torch.ones(13, dtype=F64))


def test_sdft_vector() -> None:
    """The figure is the mean over all 13 tokens; the head's, over each of 4 responses first."""
    x = sdft_input()
    loss_GK, grad_T = loss_and_grad(SDFT(), x)
    assert (loss_GK * x.seg.length_GK).sum().item() / 13 == pytest.approx(0.255385, abs=6e-7)
    length_T = x.seg.spread(x.seg.length_GK)
    assert_close(grad_T * 4 * length_T / 13, torch.tensor(SAMPLED, dtype=F64), rtol=0, atol=6e-7)


def test_rltf_sd_vector() -> None:
    x = from_sums([[-12.3, -15.1, -9.8, -20.4]], [[0.0] * 4], [[7, 9, 5, 11]], [[1.0, 0.0, 1.0, 1.0]])
    x = change(x, ref=None, response_columns={"first_reward": torch.tensor([[0, 0, 1, 0]], dtype=F64)})
    loss_GK, grad_T = loss_and_grad(RLTFSD(), x)
    assert loss_GK.mean().item() == pytest.approx(7.025, abs=6e-7)
    assert_close(grad_T, x.seg.spread(torch.tensor([[-0.1875, 0.0625, -0.1875, -0.1875]], dtype=F64)))


def test_xpo_vector() -> None:
    x = from_sums([[-12.3, -15.1]], [[-13.0, -14.2]], [[7, 9]], [[1.0, 0.0]])
    x = change(x, response_columns={"from_reference": torch.tensor([[0.0, 1.0]], dtype=F64)})
    loss_G, grad_T = loss_and_grad(XPO(beta=0.1, alpha=1e-2), x)
    assert loss_G.item() == pytest.approx(0.465344, abs=6e-7)
    assert_close(grad_T, x.seg.spread(torch.tensor([[-0.046009, 0.056009]], dtype=F64)), rtol=0, atol=6e-7)


STUDENT_LOGITS, TEACHER_LOGITS = [1, 0.2, -0.5], [0.3, 0.9, -1]


def from_logits(student: Tensor, teacher: Tensor) -> HeadInput:
    candidate = student.log_softmax(-1)
    seg = segments([[len(student)]])
    return HeadInput(seg, candidate[:, 0], candidate=candidate, teacher=teacher.log_softmax(-1).detach())


@pytest.mark.parametrize(("beta", "value"), [(0.0, 0.226548), (0.5, 0.053764), (1.0, 0.212568)])
def test_gjsd_vectors(beta: float, value: float) -> None:
    x = from_logits(*(torch.tensor([v], dtype=F64) for v in (STUDENT_LOGITS, TEACHER_LOGITS)))
    assert GJSD(beta=beta)(x).loss.item() == pytest.approx(value, abs=6e-7)


# TRL 1.16's own functions on the same numbers.


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_gjsd_is_trl_s_gkd(beta: float) -> None:
    gkd = pytest.importorskip("trl.experimental.gkd")
    rng = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(6, 40, generator=rng, dtype=F64).requires_grad_(True) for _ in range(2))
    theirs = gkd.GKDTrainer.generalized_jsd_loss(student[None], teacher.detach()[None], beta=beta, reduction="none")
    ours = GJSD(beta=beta)(from_logits(student, teacher)).loss
    assert_close(ours, theirs.sum(-1).flatten())
    want, got = (torch.autograd.grad(loss.sum(), student, retain_graph=True)[0] for loss in (theirs, ours))
    assert_close(got, want)


def test_sdft_is_trl_s_sampled_token_loss() -> None:
    theirs = pytest.importorskip("trl.experimental.sdpo.loss_utils")
    rng = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(1, 7, 11, generator=rng, dtype=F64) for _ in range(2))
    ids = torch.randint(11, (1, 7), generator=rng)
    pick = [t.log_softmax(-1).gather(-1, ids[..., None]).flatten() for t in (student, teacher)]
    old_T = pick[0] + 0.7 * torch.randn(7, generator=rng, dtype=F64)
    student.requires_grad_(True)
    want = theirs.compute_sampled_token_self_distillation_loss(student, teacher, ids, distillation_alpha=1.0)
    logp = student.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    want = theirs.apply_importance_sampling_clipping(want, logp, old_T[None], 2.0).mean()
    ones = torch.ones(7, dtype=F64)
    x = HeadInput(segments([[7]]), logp.flatten(), old=old_T, privileged=pick[1], correction=ones)
    got = SDFT()(x).loss.squeeze()
    assert_close(got, want)
    grads = [torch.autograd.grad(loss, student, retain_graph=True)[0] for loss in (got, want)]
    assert_close(*grads)
