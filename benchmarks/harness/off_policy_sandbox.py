"""Training on a fixed file of the base model's scored answers, pass after pass: CoPG, TOPR, A-LoL and plain policy
gradient, by the true reward of what the policy then says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from claims.lab import Finding, Lab, minus

from harness.derive import derive
from harness.kept import once
from harness.plain_pg import NAME, known
from harness.stats import interval
from po.heads import HEADS

QUESTIONS, AT, BETA = 64, (16, 64), 0.1  # 8 questions a step: after 2 and 8 passes


@dataclass(frozen=True)
class Case:
    """A row of the table."""

    name: str
    term: Mapping[str, Any]
    rows: str = "scored"
    batch: int = 8


CASES = (
    Case("CoPG", {"head": "copg", "beta": BETA}),
    Case("TOPR", {"head": "topr"}, "sampled", 32),
    Case("A-LoL", {"head": "a_lol"}),
    Case("PG on R_beta, b = 0", {"head": "plain_pg", "beta": BETA}),
    Case("PG on R_beta, b = 0, rewards less 1", {"head": "plain_pg", "beta": BETA}, "penalties"),
    Case("PG on R_beta, b = V", {"head": "plain_pg", "beta": BETA, "baseline": "value"}),
    Case("PG on R, b = V", {"head": "plain_pg", "baseline": "value"}),
)
SETTING = """{questions} questions, four answers of the base to each, sampled once and scored; 8 questions a step,
constant learning rate 1e-3, LoRA: after {last} steps every answer was seen {passes} times, and the policy is no
longer the one that gave it. R_beta = R - beta log pi/ref, beta {beta}. Plain policy gradient weighs log pi of an
answer with R_beta (or R) less a baseline b, without a ratio, as if the policy had just said it: it is a head of the
benchmark, not of po (b = V: the mean reward of the question's answers). Rewards are between 0 and 1; "less 1" counts
what is missing instead, -1 to 0: CoPG's loss is the same for both. TOPR: labels by whether an answer is above V, the
sampler's log-probs are the base's. A-LoL: its value is V. True reward of answers to {held_out} held-out questions,
and KL to the base in nats per answer."""


def off_policy(lab: Lab, seeds: Sequence[int] = (0, 1, 2), cases: Sequence[Case] = CASES) -> Finding:
    """Reward and KL after few and after many passes."""
    files = _files(lab)
    at = sorted({lab.steps(n) for n in AT})
    finding = Finding(
        "Off-policy on the sandbox: a fixed file of answers, many passes",
        "Flet-Berliac et al. 2024 (arXiv:2406.19185): contrasting the answers of a prompt makes policy gradient sound "
        "on answers of anybody; without the right baseline it is not.",
        SETTING.format(
            questions=QUESTIONS, last=at[-1], passes=at[-1] * 8 // QUESTIONS, beta=BETA, held_out=lab.world.questions
        ),
        ("loss", *(f"step {n}: reward (KL)" for n in at)),
    )
    base = [lab.score(lab.world.model, seed)["reward"] for seed in seeds]
    got: dict[str, list[dict[int, dict[str, float]]]] = {case.name: [] for case in cases}
    for seed in seeds:
        for case in cases:
            got[case.name].append(_followed(lab, case, files[case.rows], seed, at))
            said = ", ".join(f"step {n}: {f['reward']:.3f} (KL {f['kl']:.2g})" for n, f in got[case.name][-1].items())
            print(f"{case.name} #{seed}: {said}", flush=True)
    finding.rows.append(("base", f"{interval(base).text()} (0)", *[""] * (len(at) - 1)))
    for name, runs in got.items():
        finding.rows.append((name, *(_cell([run[n] for run in runs]) for n in at)))
        finding.expect(f"{name}: reward after step {at[-1]} above the base", minus(_of(runs, at[-1]), base))
    ours = _of(got[cases[0].name], at[-1])
    for case in cases[1:]:
        if case.term["head"] == NAME:
            finding.expect(f"{cases[0].name} above {case.name}", minus(ours, _of(got[case.name], at[-1])))
    return finding


def _files(lab: Lab) -> dict[str, Path]:
    rows = lab.world.train[:QUESTIONS]
    less = [{**r, "responses": [{**a, "reward": a["reward"] - 1} for a in r["responses"]]} for r in rows]
    folder = lab.folder / "rows"
    return {
        "scored": derive(lab.world, "scored", folder / "off_policy.jsonl", rows),
        "sampled": derive(lab.world, "sampled", folder / "off_policy_sampled.jsonl", rows),
        "penalties": derive(lab.world, "scored", folder / "off_policy_penalties.jsonl", less),
    }


def _followed(lab: Lab, case: Case, rows: Path, seed: int, at: Sequence[int]) -> dict[int, dict[str, float]]:
    """What is measured after each step of `at`; trained once, then read."""

    def made() -> list[list[Any]]:
        found: list[list[Any]] = []
        train = {"lr_scheduler_type": "constant"}
        lab.train(
            case.term,
            rows,
            seed,
            AT[-1],
            at=at,
            look=lambda step, plain: found.append([step, lab.score(plain, seed)]),
            batch=case.batch,
            train=train,
        )
        return found

    with known():
        parts = (lab.world.key, lab.world.questions, case, seed, tuple(at), QUESTIONS)
        return dict(once(lab.folder / "sandbox.jsonl", parts, HEADS[case.term["head"]], made))


def _of(runs: Sequence[Mapping[int, Mapping[str, float]]], step: int) -> list[float]:
    return [run[step]["reward"] for run in runs]


def _cell(found: Sequence[Mapping[str, float]]) -> str:
    reward, kl = (interval([f[name] for f in found]) for name in ("reward", "kl"))
    return f"{reward.text()} ({kl.mean:.2g})"
