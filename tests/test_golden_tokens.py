"""Token-level heads and distillation against their papers' formulas: loss, and gradient for all that carries one.

Beside policy_T these are token_kl_T, the gates and candidate_TM. The vectors are of logits: both models' log-probs and
KL are made from them here, in plain torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from heads_golden import RAGGED, sigmoid, token_values
from heads_support import F64, change, name_of, parts, random_input, segments
from mpmath import exp, log, mp, mpf
from torch import Tensor
from torch.testing import assert_close

from po.heads.adpa import ADPA
from po.heads.bmc import BMC
from po.heads.dckd import DCKD
from po.heads.dpo import DPO
from po.heads.mapo import MaPO
from po.heads.sparsepo import SparsePO
from po.heads.tdpo1 import TDPO1
from po.heads.tdpo2 import TDPO2
from po.types import Head, HeadInput

COVERED: set[type[Head]] = {ADPA, BMC, DCKD, MaPO, SparsePO, TDPO1, TDPO2}

Pair = dict[str, list]  # name -> numbers of the better and of the worse response's tokens
PairFormula = Callable[[Pair, Pair], mpf]  # what is differentiated, and the same numbers as constants


def named(x: HeadInput) -> dict[str, Tensor]:
    """Everything of an input that has a value per token, by its name in formulas."""
    single = {"policy": x.policy_T, "ref": x.ref, "kl": x.token_kl, "differs": x.differs, "candidate": x.candidate}
    single |= {"teacher": x.teacher, "teacher_ref": x.teacher_ref, **x.gates}
    return {k: t for k, t in single.items() if t is not None}


def with_leaves(x: HeadInput, names: list[str]) -> tuple[HeadInput, dict[str, Tensor]]:
    """The input with these of its tensors as leaves."""
    leaf = {k: t.detach().clone().requires_grad_(True) for k, t in named(x).items() if k in names}
    fields = {"policy": "policy_T", "kl": "token_kl", "candidate": "candidate"}
    gates = {k: leaf.get(k, t) for k, t in x.gates.items()}
    return change(x, gates=gates, **{fields[k]: t for k, t in leaf.items() if k in fields}), leaf


def numbers(t: Tensor) -> list:
    return [[mpf(v) for v in row] for row in t.tolist()] if t.dim() == 2 else [mpf(v) for v in t.tolist()]


def check_pairs(head: Head, formula: PairFormula, x: HeadInput, *carry: str) -> None:
    """Losses of the pairs, and the gradient of their mean for each tensor in `carry`, are the formula's."""
    y, leaf = with_leaves(x, list(carry))
    out = parts(head, y)
    found = torch.autograd.grad(out.loss, list(leaf.values()))
    step = mpf(10) ** -20
    with mp.workdps(50):
        values = {k: numbers(t) for k, t in named(x).items()}

        def losses(at: dict[str, list]) -> list[mpf]:
            now, held = ({k: token_values(x, v) for k, v in one.items()} for one in (at, values))
            G = range(x.seg.valid_GK.shape[0])
            return [formula(*({k: v[g] for k, v in one.items()} for one in (now, held))) for g in G]

        def derivative(name: str, t: int, m: int | None) -> float:
            moved = []
            for d in (step, -step):
                v = list(values[name])
                v[t] = v[t] + d if m is None else [*v[t][:m], v[t][m] + d, *v[t][m + 1 :]]
                moved.append(sum(losses({**values, name: v})))
            return float((moved[0] - moved[1]) / (2 * step) / x.seg.valid_GK.shape[0])

        assert_close(out.outputs[0].loss.detach(), torch.tensor([float(v) for v in losses(values)], dtype=F64))
        for (name, t), grad in zip(leaf.items(), found, strict=True):
            width = [None] if t.dim() == 1 else range(t.shape[1])
            want = [[derivative(name, i, m) for m in width] for i in range(t.shape[0])]
            assert_close(grad, torch.tensor(want, dtype=F64).view(t.shape), msg=lambda m, n=name: f"{n}: {m}")


def total(weight: list, x: list) -> mpf:
    return sum((w * v for w, v in zip(weight, x, strict=True)), mpf(0))


def ratio(v: Pair, k: int) -> list:
    return [p - r for p, r in zip(v["policy"][k], v["ref"][k], strict=True)]


def tdpo1(beta: float) -> PairFormula:
    def loss(v: Pair, _: Pair) -> mpf:
        h = sum(ratio(v, 0)) - sum(ratio(v, 1))
        return -log(sigmoid(mpf(beta) * (h - (sum(v["kl"][1]) - sum(v["kl"][0])))))

    return loss


def tdpo2(beta: float, alpha: float) -> PairFormula:
    def loss(v: Pair, held: Pair) -> mpf:
        h = sum(ratio(v, 0)) - sum(ratio(v, 1))
        return -log(sigmoid(mpf(beta) * (h - mpf(alpha) * (sum(v["kl"][1]) - sum(held["kl"][0])))))

    return loss


def sparsepo(beta: float, lu: float, ld: float) -> PairFormula:
    def loss(v: Pair, _: Pair) -> mpf:
        u = [total(v["mask_u"][k], ratio(v, k)) for k in range(2)]
        d = [total(v["mask_d"][k], v["kl"][k]) for k in range(2)]
        penalty = sum(mpf(lu) * abs(m) for k in range(2) for m in v["mask_u"][k])
        penalty += sum(mpf(ld) * abs(m) for k in range(2) for m in v["mask_d"][k])
        return -log(sigmoid(mpf(beta) * (u[0] - u[1] - (d[1] - d[0])))) + penalty

    return loss


def mapo(beta: float, layers: int) -> PairFormula:
    def masks(v: Pair, k: int) -> list:
        rows = []
        for name in [f"layer_{i}" for i in range(layers)]:
            a = v[name][k]
            low, high = min(a), max(a)
            rows.append([mpf(1) if low == high else (value - low) / (high - low) for value in a])
        return [sum(column) / layers for column in zip(*rows, strict=True)]

    def loss(v: Pair, _: Pair) -> mpf:
        u = [total(masks(v, k), ratio(v, k)) for k in range(2)]
        d = [total(masks(v, k), v["kl"][k]) for k in range(2)]
        return -log(sigmoid(mpf(beta) * (u[0] - u[1] - (d[1] - d[0]))))

    return loss


def bmc(beta: float, delta: float, form: str) -> PairFormula:
    def weights(v: Pair, k: int, model: str) -> list:
        pairs = zip(v[model][k], v["differs"][k], strict=True)
        return [1 + min(1 / exp(p), mpf(delta)) if d else mpf(1) for p, d in pairs]

    def loss(v: Pair, held: Pair) -> mpf:
        ref = "policy" if form == "paper" else "ref"
        u = [
            total(weights(held, k, "policy"), v["policy"][k]) - total(weights(held, k, ref), v["ref"][k])
            for k in range(2)
        ]
        return -log(sigmoid(mpf(beta) * (u[0] - u[1])))

    return loss


def mean(x: list) -> mpf:
    return sum(x, mpf(0)) / len(x)


def dckd(sft: float, chosen: float, rejected: float) -> PairFormula:
    def kl(v: Pair, k: int) -> mpf:
        per_token = []
        for teacher, student in zip(v["teacher"][k], v["candidate"][k], strict=True):
            stored = [(t, s) for t, s in zip(teacher, student, strict=True) if not mp.isinf(t)]
            per_token.append(sum((exp(t) * (t - s) for t, s in stored), mpf(0)))
        return mean(per_token)

    return lambda v, _: -mpf(sft) * mean(v["policy"][0]) + mpf(chosen) * kl(v, 0) + mpf(rejected) * kl(v, 1)


def adpa(sft: float, weight: float) -> PairFormula:
    def loss(v: Pair, _: Pair) -> mpf:
        gains = []
        for student, p, q in zip(v["candidate"][1], v["teacher"][1], v["teacher_ref"][1], strict=True):
            rows = zip(student, p, q, strict=True)
            gains.append(sum((exp(s) * (a - b) for s, a, b in rows if not mp.isinf(a)), mpf(0)))
        return -mpf(sft) * mean(v["policy"][0]) - mpf(weight) * mean(gains)

    return loss


KL = ("policy", "kl")
MASKS = (*KL, "mask_u", "mask_d")
STUDENT = ("policy", "candidate")
CASES: list[tuple[Head, PairFormula, tuple[str, ...]]] = [
    (TDPO1(beta=0.1), tdpo1(0.1), KL),
    (TDPO1(beta=2.0), tdpo1(2), KL),
    (TDPO2(beta=0.1), tdpo2(0.1, 0.5), KL),
    (TDPO2(beta=0.7, alpha=1.5), tdpo2(0.7, 1.5), KL),
    (SparsePO(beta=0.8, lambda_u=0.001, lambda_d=0.02, common=False), sparsepo(0.8, 0.001, 0.02), MASKS),
    (SparsePO(beta=0.8, lambda_u=0.3, lambda_d=0.02), sparsepo(0.8, 0.15, 0.01), MASKS),
    (SparsePO(mask="simple_last", common=False), sparsepo(0.1, 0, 0), MASKS),
    (MaPO(beta=0.8), mapo(0.8, 3), KL),
    (BMC(beta=0.05), bmc(0.05, 2, "paper"), ("policy",)),
    (BMC(beta=0.3, delta=6.0), bmc(0.3, 6, "paper"), ("policy",)),
    (BMC(beta=0.3, delta=6.0, form="code"), bmc(0.3, 6, "code"), ("policy",)),
    (DCKD(), dckd(1, 1, 1), STUDENT),
    (DCKD(sft=0.5, chosen=2.0, rejected=0.25), dckd(0.5, 2, 0.25), STUDENT),
    (ADPA(), adpa(1, 1), STUDENT),
    (ADPA(sft=0.0, advantage=3.0), adpa(0, 3), STUDENT),
]


@pytest.mark.parametrize(("head", "formula", "carry"), CASES, ids=lambda v: name_of(v) if isinstance(v, Head) else "")
def test_loss_and_gradients_are_the_paper_s(head: Head, formula: PairFormula, carry: tuple[str, ...]) -> None:
    x = random_input(head, RAGGED["pair"], seed=3)
    if isinstance(head, SparsePO):  # dense masks, different ones, and some exact zeros
        T = x.policy_T.numel()
        x = change(x, gates={"mask_u": torch.linspace(0.1, 2, T, dtype=F64), "mask_d": (torch.arange(T) % 3).to(F64)})
        if head.lambda_d != 0:
            x = change(x, gates={**x.gates, "mask_d": x.gates["mask_d"] + 0.5})  # |m| has no derivative at 0
    if x.teacher is not None:  # some positions store fewer tokens
        short_TM = torch.zeros_like(x.teacher_TM).bool()
        short_TM[::4, 2] = short_TM[1::5, 1:] = True
        gone = {"teacher": x.teacher, "teacher_ref": x.teacher_ref}
        x = change(x, **{k: t.masked_fill(short_TM, -math.inf) for k, t in gone.items() if t is not None})
    check_pairs(head, formula, x, *carry)


# Vectors of an independent float64 script that also ran the public code named, to 6 decimals. Vocabulary of 4; rows are
# the logits that predict the tokens "yw" of the better response and "yl" of the worse.

LOGITS = {
    "w": [[0.2, -0.1, 0.5, 0.0], [1.0, 0.3, -0.4, 0.1], [-0.2, 0.8, 0.1, 0.4]],
    "l": [[-0.3, 0.6, 0.2, 0.1], [0.4, 0.0, -0.5, 0.9]],
}
REF_LOGITS = {
    "w": [[0.0, 0.1, 0.3, -0.2], [0.7, 0.2, -0.1, 0.3], [0.1, 0.6, 0.2, 0.2]],
    "l": [[0.1, 0.2, 0.3, 0.0], [0.2, 0.1, 0.0, 0.4]],
}
TARGET_T = torch.tensor([2, 0, 3, 1, 2])
MASK_U_T = torch.tensor([0.7, 0.0, 1.3, 0.4, 0.9], dtype=F64)
MASK_D_T = torch.tensor([0.5, 1.0, 0.0, 0.2, 0.6], dtype=F64)
DIFFERS_T = torch.tensor([0, 1, 1, 1, 0]).bool()


def from_logits(logits_TV: Tensor, ref_TV: Tensor) -> HeadInput:
    """One pair, three tokens and two, with all that the token-level heads read."""
    policy_TV, other_TV = logits_TV.log_softmax(-1), ref_TV.log_softmax(-1)
    policy_T, ref_T = (t.gather(-1, TARGET_T[:, None])[:, 0] for t in (policy_TV, other_TV))
    kl_T = (other_TV.exp() * (other_TV - policy_TV)).sum(-1)
    return HeadInput(segments([[3, 2]]), policy_T, ref=ref_T, token_kl=kl_T, differs=DIFFERS_T)


def logits(of: dict[str, list[list[float]]]) -> Tensor:
    return torch.tensor(of["w"] + of["l"], dtype=F64)


LOGIT_VECTORS: list[tuple[Head, float, list[list[float]]]] = [
    # no public counterpart
    (
        DPO(beta=0.1),
        0.655641,
        [
            [0.012301, 0.009113, -0.031485, 0.010071],
            [-0.025719, 0.011108, 0.005516, 0.009095],
            [0.006979, 0.018972, 0.009421, -0.035372],
            [-0.007286, 0.030168, -0.012013, -0.01087],
            [-0.012908, -0.008652, 0.042841, -0.021281],
        ],
    ),
    # TDPO repository, if_tdpo2=False
    (
        TDPO1(beta=0.1),
        0.657691,
        [
            [0.011277, 0.012463, -0.032973, 0.009233],
            [-0.030517, 0.010723, 0.007944, 0.01185],
            [0.009919, 0.016353, 0.010962, -0.037234],
            [-0.01139, 0.035608, -0.013912, -0.010306],
            [-0.012217, -0.011054, 0.038193, -0.014922],
        ],
    ),
    # TDPO repository, if_tdpo2=True
    (
        TDPO2(beta=0.1, alpha=0.5),
        0.656665,
        [
            [0.012314, 0.009123, -0.031519, 0.010082],
            [-0.025748, 0.011121, 0.005522, 0.009105],
            [0.006987, 0.018993, 0.009431, -0.035411],
            [-0.009336, 0.032885, -0.012961, -0.010588],
            [-0.012563, -0.009852, 0.04052, -0.018105],
        ],
    ),
    # BMC repository
    (
        BMC(beta=0.1, delta=4.0, form="code"),
        0.680443,
        [
            [0.012626, 0.009354, -0.032317, 0.010337],
            [-0.083152, 0.035914, 0.017834, 0.029404],
            [0.034254, 0.093111, 0.046238, -0.173602],
            [-0.027547, 0.114061, -0.045418, -0.041096],
            [-0.013249, -0.008881, 0.043974, -0.021844],
        ],
    ),
    # no public counterpart
    (
        BMC(beta=0.1, delta=4.0, form="paper"),
        0.649560,
        [
            [0.01222, 0.009053, -0.031277, 0.010005],
            [-0.080477, 0.034758, 0.01726, 0.028458],
            [0.033151, 0.090115, 0.04475, -0.168016],
            [-0.026661, 0.110391, -0.043956, -0.039773],
            [-0.012823, -0.008595, 0.042559, -0.021141],
        ],
    ),
]


@pytest.mark.parametrize(
    ("head", "loss", "grad"), LOGIT_VECTORS, ids=lambda v: name_of(v) if isinstance(v, Head) else ""
)
def test_logit_vectors(head: Head, loss: float, grad: list[list[float]]) -> None:
    logits_TV = logits(LOGITS).requires_grad_(True)
    loss_G = head(from_logits(logits_TV, logits(REF_LOGITS))).loss
    (grad_TV,) = torch.autograd.grad(loss_G.sum(), logits_TV)
    assert_close(loss_G, torch.tensor([loss], dtype=F64), rtol=0, atol=6e-7)
    assert_close(grad_TV, torch.tensor(grad, dtype=F64), rtol=0, atol=6e-7)


def test_sparsepo_vector() -> None:
    """SparsePO repository, independent masks; mask gradients have lambda in them, but not where the mask is 0."""
    head = SparsePO(beta=0.8, lambda_u=0.001, lambda_d=0.001, common=False)
    logits_TV = logits(LOGITS).requires_grad_(True)
    gates = {k: t.clone().requires_grad_(True) for k, t in (("mask_u", MASK_U_T), ("mask_d", MASK_D_T))}
    loss_G = head(change(from_logits(logits_TV, logits(REF_LOGITS)), gates=gates)).loss
    found = torch.autograd.grad(loss_G.sum(), [logits_TV, *gates.values()])
    assert_close(loss_G, torch.tensor([0.462177], dtype=F64), rtol=0, atol=6e-7)
    of_logits = [
        [0.049309, 0.049029, -0.138709, 0.040371],
        [-0.028842, -0.002496, 0.014694, 0.016644],
        [0.055326, 0.150393, 0.074683, -0.280402],
        [-0.022746, 0.080123, -0.031579, -0.025797],
        [-0.068213, -0.056184, 0.217802, -0.093405],
    ]
    of_mask_u = [-0.02513, -0.069659, -0.043202, 0.105231, -0.187492]
    of_mask_d = [-0.003202, -0.00744, -0.005981, 0.013344, 0.019765]
    for grad, want in zip(found, (of_logits, of_mask_u, of_mask_d), strict=True):
        assert_close(grad, torch.tensor(want, dtype=F64), rtol=0, atol=6e-7)


@pytest.mark.parametrize(
    ("form", "loss", "grad"),
    [
        ("paper", 0.692135, [-0.049949, -0.132302, -0.149848, -0.049949, 0.049949, 0.149848, 0.049949]),
        ("code", 0.696623, [-0.050174, -0.132896, -0.150521, -0.050174, 0.050174, 0.150521, 0.050174]),
    ],
)
def test_bmc_vectors_of_log_probs(form: str, loss: float, grad: list[float]) -> None:
    policy_T = torch.tensor([-1, -0.5, -2, -0.3, -0.7, -1.2, -0.9], dtype=F64, requires_grad=True)
    ref_T = torch.tensor([-1.1, -0.3, -2.3, -0.35, -0.6, -1.4, -0.9], dtype=F64)
    x = HeadInput(segments([[4, 3]]), policy_T, ref=ref_T, differs=torch.tensor([0, 1, 1, 0, 0, 1, 0]).bool())
    loss_G = BMC(beta=0.1, delta=2.0, form=form)(x).loss  # type: ignore[arg-type]
    assert_close(loss_G, torch.tensor([loss], dtype=F64), rtol=0, atol=6e-7)
    (grad_T,) = torch.autograd.grad(loss_G.sum(), policy_T)
    assert_close(grad_T, torch.tensor(grad, dtype=F64), rtol=0, atol=6e-7)


def student(logits_V: Tensor, teacher_V: Tensor, teacher_ref_V: Tensor) -> HeadInput:
    """One pair of one-token responses, the whole vocabulary stored; the same distributions on both."""
    both = [t.expand(2, -1) for t in (logits_V.log_softmax(-1), teacher_V, teacher_ref_V)]
    return HeadInput(segments([[1, 1]]), both[0][:, 0], candidate=both[0], teacher=both[1], teacher_ref=both[2])


def test_adpa_vector() -> None:
    """The vector's inputs are not given with it. These student logits and these differences of advantages, in round
    numbers, give its gradient; the constant in the advantages, which has no gradient, is then fixed by its value."""
    logits_V = torch.tensor([1, 0.2, -0.5], dtype=F64, requires_grad=True)
    advantage_V = torch.tensor([0, 0.5, -1], dtype=F64)
    x = student(logits_V, advantage_V - 0.083765, torch.zeros(3, dtype=F64))
    loss_G = ADPA(sft=0.0)(x).loss
    assert_close(loss_G, torch.tensor([0.082847], dtype=F64), rtol=0, atol=2e-6)
    (grad_V,) = torch.autograd.grad(loss_G.sum(), logits_V)
    assert_close(grad_V, torch.tensor([0.000549, -0.134085, 0.133537], dtype=F64), rtol=0, atol=6e-7)


@pytest.mark.parametrize("head", [DCKD(sft=0.0, rejected=0.0), DCKD(sft=0.0, chosen=0.0)], ids=name_of)
def test_dckd_vector(head: Head) -> None:
    """KL(teacher || student) over a whole vocabulary of 3, as TRL 1.16's GKD computes it."""
    logits_V = torch.tensor([1, 0.2, -0.5], dtype=F64, requires_grad=True)
    teacher_V = torch.tensor([0.3, 0.9, -1], dtype=F64).log_softmax(-1)
    loss_G = head(student(logits_V, teacher_V, teacher_V)).loss
    assert_close(loss_G, torch.tensor([0.226548], dtype=F64), rtol=0, atol=6e-7)
    (grad_V,) = torch.autograd.grad(loss_G.sum(), logits_V)
    assert_close(grad_V, (logits_V.softmax(-1) - teacher_V.exp()).detach())


@pytest.mark.parametrize("head", [TDPO1(), TDPO2(), SparsePO(), MaPO(), BMC()], ids=name_of)
def test_values_at_policy_equals_reference(head: Head) -> None:
    """log 2, and the KL has no gradient: what is left is DPO's, times the token's weight."""
    logits_TV = logits(LOGITS).requires_grad_(True)
    x = from_logits(logits_TV, logits_TV.detach())
    gates = {f"layer_{i}": MASK_U_T + i for i in range(2)} | {"mask_u": MASK_U_T, "mask_d": MASK_D_T}
    if isinstance(head, MaPO):
        gates = {k: t for k, t in gates.items() if "layer" in k}
    loss_G = head(change(x, gates=gates)).loss
    assert_close(loss_G, torch.tensor([math.log(2)], dtype=F64))
    (grad_TV,) = torch.autograd.grad(loss_G.sum(), logits_TV)
    weight_T = torch.ones(5, dtype=F64)
    if isinstance(head, SparsePO):
        weight_T = MASK_U_T
    if isinstance(head, MaPO):
        weight_T = torch.tensor([0.7 / 1.3, 0, 1, 0, 1], dtype=F64)
    if isinstance(head, BMC):
        weight_T = torch.where(DIFFERS_T, 1 + (1 / x.policy_T.detach().exp()).clamp(max=2.0), 1)
    sign_T = torch.tensor([1, 1, 1, -1, -1], dtype=F64)
    of_dpo_TV = torch.nn.functional.one_hot(TARGET_T, 4) - logits_TV.detach().softmax(-1)
    assert_close(grad_TV, -0.5 * head.beta * (sign_T * weight_T)[:, None] * of_dpo_TV)  # type: ignore[attr-defined]
