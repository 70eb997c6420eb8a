"""The off-policy benchmark: what it trains on, its plain policy gradient, a step of each part."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import off_policy
from claims import Lab
from harness import off_policy_sandbox, plain_pg, verdicts
from harness.kept import once
from harness.plain_pg import PlainPG
from harness.world import World
from heads_support import random_input
from test_objectives_bench import world  # noqa: F401 (the fixture)

from po.heads import HEADS
from po.heads.copg import CoPG
from po.numeric import leave_one_out
from po.types import HeadInput

SHARED = Path(__file__).parents[1].parent / "shared"
LENGTHS = ((3, 1, 4, 2), (2, 5, 1, 1))


def slope(head: Any, x: HeadInput) -> torch.Tensor:
    """The gradient of the mean loss."""
    policy_T = x.policy_T.detach().requires_grad_(True)
    fields = {**vars(x), "policy_T": policy_T}
    (found_T,) = torch.autograd.grad(head(HeadInput(**fields)).loss.mean(), policy_T)
    return found_T


def given(value: torch.Tensor, **change: Any) -> HeadInput:
    x = random_input(PlainPG.needs, LENGTHS)
    return HeadInput(**{**vars(x), "columns": {"value": value}, **change})


def test_plain_policy_gradient_weighs_by_regularised_reward_less_baseline() -> None:
    x = given(torch.tensor([0.3, -0.7], dtype=torch.float64))
    weight_GK = x.reward_GK - 0.2 * x.logratio_GK.detach() - x.column_G("value")[:, None]
    torch.testing.assert_close(slope(PlainPG(0.2, "value"), x), -x.seg.spread(weight_GK) / 8)
    torch.testing.assert_close(slope(PlainPG(), x), -x.seg.spread(x.reward_GK) / 8)


def test_copg_does_not_see_the_zero_of_the_rewards_and_plain_policy_gradient_does() -> None:
    x = given(torch.zeros(2, dtype=torch.float64))
    less = given(torch.zeros(2, dtype=torch.float64), reward=x.reward_GK - 1)
    torch.testing.assert_close(slope(CoPG(beta=0.1), less), slope(CoPG(beta=0.1), x))
    assert (slope(PlainPG(beta=0.1), less) - slope(PlainPG(beta=0.1), x)).abs().min() > 0.1


def test_what_separates_them_is_the_baseline() -> None:
    """CoPG is twice plain policy gradient on R_beta less the other answers' mean R_beta, averaged over answers."""
    x = given(torch.zeros(2, dtype=torch.float64))
    weight_GK = leave_one_out(x.reward_GK - 0.1 * x.logratio_GK.detach(), x.seg.valid_GK)
    torch.testing.assert_close(slope(CoPG(beta=0.1), x), 2 * -x.seg.spread(weight_GK) / 8)


def test_po_does_not_offer_it() -> None:
    assert plain_pg.NAME not in HEADS
    with plain_pg.known():
        assert HEADS[plain_pg.NAME] is PlainPG
    assert plain_pg.NAME not in HEADS


def test_a_result_is_made_once(tmp_path: Path) -> None:
    path, made = tmp_path / "r.jsonl", iter(range(9))
    assert [once(path, ("a",), CoPG, lambda: next(made)) for _ in range(2)] == [0, 0]
    assert once(path, ("b",), CoPG, lambda: next(made)) == 1
    assert once(path, ("a",), PlainPG, lambda: next(made)) == 2, "other code, another result"
    path.write_text(path.read_text()[:-5])  # an interruption within the last line
    assert once(path, ("a",), PlainPG, lambda: next(made)) == 3
    assert once(path, ("a",), PlainPG, lambda: next(made)) == 3


def test_a_part_without_its_files_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / verdicts.DATA.parent).mkdir()
    with gzip.open(tmp_path / verdicts.DATA, "wt") as file:
        file.write(json.dumps({}))
    assert off_policy.main(["verdicts", "--shared", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert f"left out: verdicts: there is no {tmp_path / verdicts.MODEL}" in said
    assert not (tmp_path / "out" / "verdicts.md").exists()


@pytest.mark.skipif(verdicts.missing(SHARED) is not None, reason=f"needs {SHARED}: a real model and real rows")
@pytest.mark.slow
def test_one_step_on_real_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`po train` takes the recipes, the sampler's log-probs included, and the report has a row for each."""
    monkeypatch.setenv("PO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(verdicts, "CASES", [c for c in verdicts.CASES if c.term["head"] == "topr"])
    monkeypatch.setattr(verdicts, "TOKENS", 220)
    found = verdicts.verdicts(SHARED, tmp_path, seeds=(0,), steps=1, held=8)
    assert [row[0] for row in found.rows] == ["base", *(case.name for case in verdicts.CASES)]
    row = json.loads((tmp_path / "rows" / "labelled.jsonl").read_text().splitlines()[0])
    assert row["label"] in (True, False)
    assert max(row["logps"]) <= 0
    scored, shuffled = (
        [json.loads(line) for line in (tmp_path / "rows" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("scored", "shuffled")
    )
    assert {len({a["reward"] for a in r["responses"]}) for r in scored} == {2}, "each has right and wrong solutions"
    assert [r["value"] for r in scored] == [r["value"] for r in shuffled]
    assert [r["responses"] for r in scored] != [r["responses"] for r in shuffled]


@pytest.mark.slow
def test_a_step_on_the_sandbox(
    world: World,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """CoPG and plain policy gradient: measured at the start of training and at its end, and not trained again."""
    monkeypatch.setenv("PO_CACHE", str(tmp_path / "cache"))
    lab, cases = Lab(world, tmp_path, share=0.01), [off_policy_sandbox.CASES[i] for i in (0, 4)]
    found = off_policy_sandbox.off_policy(lab, (0, 1), cases)
    assert [row[0] for row in found.rows] == ["base", "CoPG", "PG on R_beta, b = 0, rewards less 1"]
    assert [said for said, _, _ in found.verdicts][-1] == "CoPG above PG on R_beta, b = 0, rewards less 1"
    monkeypatch.setattr(off_policy_sandbox, "once", _never_made(off_policy_sandbox.once))
    assert off_policy_sandbox.off_policy(lab, (0, 1), cases).rows == found.rows


def _never_made(once: Any) -> Any:
    def fail() -> None:
        raise AssertionError("trained again")

    return lambda path, parts, code, make: once(path, parts, code, fail)


def test_the_cases_are_recipes() -> None:
    """Every term names a head and fields that it has."""
    with plain_pg.known():
        for case in (*off_policy_sandbox.CASES, *verdicts.CASES):
            fields = {k: v for k, v in case.term.items() if k != "head"}
            HEADS[case.term["head"]](**fields)
