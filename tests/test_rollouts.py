"""Runs that sample: which prompts, what is kept, what counts, what heads see; and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from online_support import journal, metrics, online, write_prompts
from safetensors.torch import load_file

import po.run
import po.sample
from po.errors import UserError
from po.order import StepSampler
from po.recipe import load
from po.rollout.journal import Journal
from po.rollout.rounds import RoundSampler
from po.rollout.written import Answer, consistency
from po.run import build, check


def trained(recipe: Path) -> Any:
    job = build(load(recipe)[0])
    job.trainer.train()
    return job


def weights(job: Any) -> dict[str, torch.Tensor]:
    return {k: p.detach().clone() for k, p in job.trainer.model.named_parameters() if p.requires_grad}


# Rounds


@pytest.mark.parametrize(("world", "per_device", "accumulation"), [(1, 4, 1), (1, 1, 4), (2, 2, 1), (2, 1, 2)])
def test_neither_ranks_nor_micro_batches_decide_who_is_in_a_round(
    world: int, per_device: int, accumulation: int
) -> None:
    rounds: dict[int, dict[int, int]] = {}
    for rank in range(world):
        for (ask,) in RoundSampler(22, per_device, accumulation, world, rank, seed=3, steps=2, iterations=3):
            for micro in ask.micros:
                for i, (row, counts) in enumerate(micro.picks):
                    if counts:
                        assert rounds.setdefault(ask.round, {}).setdefault(micro.first + i, row) == row
    order = StepSampler(22, 1, seed=3).order()
    assert [dict(sorted(r.items())) for r in rounds.values()] == [
        dict(enumerate(order[:8])), dict(enumerate(order[8:16])), dict(enumerate(order[16:])),
    ]  # fmt: skip


def test_a_round_is_trained_on_as_often_as_asked() -> None:
    sampler = RoundSampler(10, 1, 2, steps=2, iterations=2, shuffle=False)
    asks = list(chain.from_iterable(sampler))
    assert len(asks) == len(sampler) == 20
    assert [(a.round, a.micro, a.age) for a in asks[:8]] == [
        (0, 0, 0), (0, 1, 0), (0, 2, 1), (0, 3, 1), (0, 0, 2), (0, 1, 2), (0, 2, 3), (0, 3, 3),
    ]  # fmt: skip
    assert [(a.round, a.micro, a.age) for a in asks[16:]] == [(2, 0, 0), (2, 1, 0), (2, 0, 1), (2, 1, 1)]
    sampler.set_epoch(1)
    assert next(iter(sampler))[0].round == 3


# The journal


def test_a_line_that_a_kill_cut_off_goes(tmp_path: Path) -> None:
    first = Journal(tmp_path, 0, {"seed": 1})
    first.write([{"round": 0, "place": p, "said": "é" * p} for p in range(3)])
    with open(first.path, "ab") as file:
        file.write(b'{"round": 0, "place": 3, "sa')
    again = Journal(tmp_path, 0, {"seed": 1})
    assert len(again) == 3
    assert again.read((0, 2))["said"] == "éé"
    again.write([{"round": 0, "place": 3}])
    assert [json.loads(x)["place"] for x in first.path.read_text().splitlines()] == [0, 1, 2, 3]


def test_samples_of_another_run_are_refused(tmp_path: Path) -> None:
    Journal(tmp_path, 0, {"seed": 1}).write([{"round": 0, "place": 0}])
    with pytest.raises(
        UserError, match="holds samples of a run that differs from this one:\n  seed: sampled with 1, now 2"
    ):
        Journal(tmp_path, 0, {"seed": 2})


# A run


def test_a_run_learns_what_its_reward_wants(tmp_path: Path) -> None:
    """All weights of a random model, so that there is something to move."""
    recipe = online(
        tmp_path,
        {"head": "grpo2"},
        32,
        rollout={"num_generations": 2},
        lora=None,
        reference={"from": "none"},
        train={"num_train_epochs": 6, "per_device_train_batch_size": 8},
    )
    job = trained(recipe)
    rewards = [m["reward"] for m in metrics(tmp_path / "run") if "reward" in m]
    assert len(rewards) == job.trainer.state.global_step == 24
    assert sum(rewards[-6:]) / 6 > sum(rewards[:6]) / 6 + 1
    lines = journal(tmp_path / "run")
    assert len(lines) == 32 * 6
    assert len({(x["round"], x["place"]) for x in lines}) == 32 * 6


def test_what_heads_see_of_a_fresh_sample(tmp_path: Path) -> None:
    """pi == mu: ratios are 1 to rounding, with and without a pass of their own; the sampler's log-probs are po's."""
    for more in ({}, {"steps_per_generation": 3}):
        recipe = online(tmp_path, out=f"run{len(more)}", rollout=more)
        trained(recipe)
        first = metrics(tmp_path / f"run{len(more)}")[0]
        assert first["sampling/sampling_logp_difference/mean"] < 1e-5
        assert abs(first["loss"]) < 1e-5  # centred advantages times ratios of 1
        assert first["rollout/staleness"] == 0


def test_a_temperature_is_that_of_training_too(tmp_path: Path) -> None:
    trained(online(tmp_path, rollout={"temperature": 0.5}))
    assert metrics(tmp_path / "run")[0]["sampling/sampling_logp_difference/mean"] < 1e-5


def test_later_steps_of_a_round_know_the_policy_that_sampled(tmp_path: Path) -> None:
    head = {"head": "grpo", "epsilon_low": 0.05, "epsilon_high": 0.05}
    trained(online(tmp_path, head, rollout={"num_iterations": 3}, train={"learning_rate": 0.05}))
    found = [m for m in metrics(tmp_path / "run") if "rollout/staleness" in m]
    assert [m["rollout/staleness"] for m in found] == [0, 1, 2] * 3
    clipped = [m["grpo/clip_low"] + m["grpo/clip_high"] for m in found]
    assert clipped[0] == 0 < clipped[2]


@pytest.mark.parametrize("split", [{"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}, {}])
def test_neither_micro_batches_nor_pieces_matter(split: dict[str, int], tmp_path: Path) -> None:
    """Same samples, same weights."""
    more = {} if split else {"max_tokens_per_forward": 40}
    runs = [trained(online(tmp_path, out=f"r{i}", **m)) for i, m in enumerate(({}, {"train": split} | more))]
    lines = [journal(tmp_path / f"r{i}") for i in range(2)]
    key = lambda x: (x["round"], x["place"])  # noqa: E731
    texts = [[r["content"] for line in sorted(rows, key=key) for r in line["responses"]] for rows in lines]
    assert texts[0] == texts[1]
    for name, w in weights(runs[0]).items():
        torch.testing.assert_close(w, weights(runs[1])[name], rtol=1e-3, atol=2e-5)


def test_rows_of_the_journal_train_again(tmp_path: Path) -> None:
    """From the file, with the sampler's token ids and log-probs: the step is that of the run itself."""
    for head in ("copg", "grpo"):
        trained(online(tmp_path, {"head": head}, out=head, train={"max_steps": 1}))
        rows = tmp_path / head / "rollouts/rank0.jsonl"
        recipe = online(tmp_path, {"head": head}, out=f"{head}-again", rows=rows, train={"max_steps": 1})
        said = yaml.safe_load(recipe.read_text())
        del said["rollout"]
        recipe.write_text(yaml.safe_dump(said))
        trained(recipe)
        first, second = metrics(tmp_path / head)[0], metrics(tmp_path / f"{head}-again")[0]
        assert second["loss"] == pytest.approx(first["loss"], abs=1e-5)
        assert second["logps/chosen"] == pytest.approx(first["logps/chosen"], abs=1e-4)
        assert second["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-3)


# What counts


def test_groups_whose_rewards_are_equal(tmp_path: Path) -> None:
    same = [f"{tmp_path}/rewards.py:same"]
    for how in ("keep", "drop"):
        trained(online(tmp_path, out=how, rollout={"rewards": same, "zero_variance": how}))
        found = metrics(tmp_path / how)[0]
        assert found["frac_reward_zero_std"] == 1
        assert ("loss/grpo" in found) == (how == "keep")
        assert found["grad_norm"] == 0


def test_a_refill_samples_other_prompts_within_its_budget(tmp_path: Path) -> None:
    late = [f"{tmp_path}/rewards.py:late"]
    rollout = {
        "rewards": late,
        "zero_variance": "refill",
        "refill_budget": 0.5,
        "num_generations": 2,
        "max_unscored": 1.0,
    }
    trained(online(tmp_path, {"head": "grpo2"}, 24, rollout=rollout, train={"max_steps": 3}))
    lines = journal(tmp_path / "run")
    per_round = [sum(x["round"] == r for x in lines) for r in range(3)]
    assert all(4 <= n <= 6 for n in per_round)
    assert sum(per_round) > 12
    for r in range(3):
        rows = [x["example"] for x in lines if x["round"] == r]
        assert len(set(rows)) == len(rows)


def test_ties_make_no_pair(tmp_path: Path) -> None:
    trained(online(tmp_path, {"head": "dpo", "beta": 0.1}, rollout={"rewards": [f"{tmp_path}/rewards.py:same"]}))
    assert "loss/dpo" not in metrics(tmp_path / "run")[0]


def test_labels_come_from_rewards(tmp_path: Path) -> None:
    trained(online(tmp_path, {"head": "topr"}, rollout={"label_above": 2.0}, train={"max_steps": 1}))
    answers = [r for line in journal(tmp_path / "run") for r in line["responses"]]
    assert {(r["reward"] > 2, r["label"]) for r in answers} == {(True, 1), (False, -1)}
    assert metrics(tmp_path / "run")[0]["loss/topr"] != 0


def test_the_reference_writes_its_share(tmp_path: Path) -> None:
    trained(online(tmp_path, {"head": "xpo"}, rollout={"num_generations": 2, "from_reference": 1}))
    assert all([r["source"] for r in x["responses"]] == ["policy", "reference"] for x in journal(tmp_path / "run"))


def test_a_failed_group_gets_the_rows_own_answer(tmp_path: Path) -> None:
    rows = write_prompts(tmp_path / "gold.jsonl", 8, response="w1 w2")
    rollout = {"rewards": [f"{tmp_path}/rewards.py:nothing"], "gold": "all_failed"}
    job = build(load(online(tmp_path, {"head": "gcpo_gold"}, rows=rows, rollout=rollout))[0])
    job.trainer.train()
    assert all(r["source"] == "policy" for x in journal(tmp_path / "run") for r in x["responses"])  # it earns nothing
    (tmp_path / "rewards.py").write_text(
        "def nothing(completions, **c):\n    return [float(t == 'w1 w2') for t in completions]\n"
    )
    recipe = online(tmp_path, {"head": "gcpo_gold"}, rows=rows, rollout=rollout, out="two")
    (tmp_path / "rewards.py").write_text(
        "def nothing(completions, **c):\n    return [float(t == 'w1 w2') for t in completions]\n"
    )
    trained(recipe)
    for x in journal(tmp_path / "two"):
        assert [r["source"] for r in x["responses"]] == ["policy"] * 3 + ["gold"]
        assert [r["reward"] for r in x["responses"]] == [0, 0, 0, 1]
        assert x["responses"][3]["logps"] is None
    assert metrics(tmp_path / "two")[0]["rollout/gold"] == 1


def test_the_rows_own_answers_join(tmp_path: Path) -> None:
    rows = tmp_path / "own.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"w{i} ", "responses": [{"content": "w1 w2", "label": True},
                    {"content": "w3", "label": False}], "wanted": "w1"}) + "\n" for i in range(8)))  # fmt: skip
    rollout = {"own_responses": True, "num_generations": 2}
    trained(online(tmp_path, {"head": "hypo_kl"}, rows=rows, rollout=rollout))
    for x in journal(tmp_path / "run"):
        assert [(r["source"], r["label"]) for r in x["responses"]] == [
            ("policy", None), ("policy", None), ("own", 1), ("own", -1),
        ]  # fmt: skip
    assert "hypo_kl/kl" in metrics(tmp_path / "run")[0]


def test_rewards_that_fail_stop_the_run_or_leave_the_group(tmp_path: Path) -> None:
    broken = [f"{tmp_path}/rewards.py:wanted", f"{tmp_path}/rewards.py:broken"]
    with pytest.raises(UserError) as e:
        trained(online(tmp_path, rollout={"rewards": broken}))
    assert "rollout.rewards: 16 of 16 samples of round 0 have no reward; rollout.max_unscored = 0 allows 0" in str(
        e.value
    )
    assert "broken" in str(e.value)
    assert "no such key" in str(e.value)
    trained(online(tmp_path, out="two", rollout={"rewards": broken, "max_unscored": 1.0}))
    assert metrics(tmp_path / "two")[0]["rollout/unscored"] == 1
    assert metrics(tmp_path / "two")[0]["grad_norm"] == 0


def test_evaluation_rewards_one_sample_each(tmp_path: Path) -> None:
    held_out = write_prompts(tmp_path / "eval.jsonl", 5, seed=9)
    recipe = online(tmp_path, train={"eval_strategy": "steps", "eval_steps": 1, "max_steps": 2})
    text = recipe.read_text().replace("data:\n", f"data:\n  eval: {held_out}\n", 1)
    recipe.write_text(text)
    trained(recipe)
    found = [m for m in metrics(tmp_path / "run") if "eval_reward" in m]
    assert len(found) == 2
    assert found[0]["eval_completions/mean_length"] <= 8
    assert "eval_loss" not in found[0]
    assert len(journal(tmp_path / "run")) == 8  # evaluation is not kept


# A resumed run


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """`po train` in this process, which lets go of the run's folder as the end of a process does."""
    made: list[Any] = []
    monkeypatch.setattr(po.run, "build", lambda *args: made.append(build(*args)) or made[-1])

    def call(recipe: Path) -> None:
        try:
            po.run.train(load(recipe)[0])
        finally:
            while made:
                made.pop().lock.release()

    return call


def test_a_resumed_run_samples_only_what_is_missing(tmp_path: Path, run: Callable[[Path], None]) -> None:
    """Killed behind its checkpoint, in the middle of writing a group: it ends where the whole run does."""
    more: dict[str, Any] = {"rollout": {"steps_per_generation": 2}, "prompts": 16}
    saved = {"save_strategy": "steps", "save_steps": 1}
    run(online(tmp_path, out="whole", **more, train=saved))
    recipe = online(tmp_path, out="part", **more, train=saved)
    run(recipe)
    for name in ("checkpoint-3", "checkpoint-4"):
        shutil.rmtree(tmp_path / "part" / name)
    written = tmp_path / "part/rollouts/rank0.jsonl"
    lines = written.read_text().splitlines()
    written.write_text("\n".join(lines[:11]) + "\n" + lines[11][:40])
    recipe.write_text(recipe.read_text() + "resume: true\n")
    run(recipe)
    assert written.read_text().splitlines()[:11] == lines[:11]
    by_place = [{(x["round"], x["place"]): x for x in journal(tmp_path / name)} for name in ("whole", "part")]
    assert by_place[0] == by_place[1]
    assert len(by_place[0]) == len(lines) == 16
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "part"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_samples_of_another_recipe_are_not_taken_over(tmp_path: Path, run: Callable[[Path], None]) -> None:
    recipe = online(tmp_path, train={"max_steps": 1})
    run(recipe)
    for name in ("adapter_config.json", "adapter_model.safetensors", "metrics.jsonl"):
        (tmp_path / "run" / name).unlink()
    recipe = online(tmp_path, rollout={"temperature": 0.7}, train={"max_steps": 1}, resume=True)
    with pytest.raises(UserError, match="holds samples of a run that differs from this one"):
        run(recipe)


# Wrong recipes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout": {"rewards": []}}, "rollout.rewards: is missing; expected at least one"),
        (
            {"rollout": {"rewards": [{"weight": 1.0}]}},
            "expected exactly one of function, verifier, model and url, got none",
        ),
        ({"rollout": {"num_generation": 2}}, "Did you mean 'num_generations'?"),
        ({"rollout": {"refill_budget": 2.0}}, "has no effect without `zero_variance: refill`"),
        ({"rollout": {"max_completion_length": 4096}}, "leaves no room for a prompt in data.max_length 2048"),
        ({"rollout": {"label_above": 1.0}}, "no head of the recipe reads labels"),
        ({"loss": {"head": "kto"}}, "which samples do not have; train it on a file"),
        ({"loss": {"head": "topr"}}, "rollout.label_above: is missing"),
        ({"loss": {"head": "copg"}, "rollout": {"num_generations": 1}}, "sample at least 2 of each prompt"),
        ({"loss": {"head": "copg"}, "rollout": {"correction": "token"}}, "no head of the recipe applies it"),
        ({"loss": {"head": "copg"}, "reference": {"from": "init", "kind": "cached"}}, "yet to be sampled"),
        ({"rollout": {"from_reference": 5}}, "is 5 of 4 samples; at most all"),
        (
            {"rollout": {"rewards": [{"url": "http://me:pw@host/x"}]}},
            "rollout.rewards[0].url: holds a user, a password",
        ),
        ({"rollout": {"rewards": [{"url": "http://host/x?api_key=1"}]}}, "name that at options.token_env"),
        ({"loss": {"head": "grpo2"}}, "head 'grpo2' compares exactly 2 responses"),
        (
            {"loss": {"head": "reinforce_pp", "baseline": "group"}, "rollout": {"num_generations": 1}},
            "head 'reinforce_pp' compares responses; sample at least 2 of each prompt",
        ),
        ({"loss": {"head": "dr_grpo"}}, "divides by max_completion_length 256, and rollout.max_completion_length is 8"),
        ({"loss": {"head": "pi_distill"}}, "head 'pi_distill' is for samples from 'privileged'"),
    ],
)
def test_wrong_recipes(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as e:
        load(online(tmp_path, changes.pop("loss", None), **changes))
    assert message in str(e.value)


def test_rows_without_the_answers_that_a_recipe_takes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"rollout.gold takes the rows' own responses; .*prompts.jsonl:1 has none"):
        build(load(online(tmp_path, {"head": "gcpo_gold"}, rollout={"gold": "all_failed"}))[0])


def test_rows_without_a_column_that_a_reward_reads(tmp_path: Path) -> None:
    recipe = load(online(tmp_path, rollout={"rewards": {"verifier": "exact"}}))[0]
    for go in (build, check):
        with pytest.raises(UserError, match=r"reads the column 'answer'; .*prompts.jsonl:1 has none"):
            go(recipe)


def test_a_wrong_reward_is_found_before_a_model_is_loaded(tmp_path: Path) -> None:
    recipe = online(tmp_path, rollout={"rewards": f"{tmp_path}/rewards.py:wantd"})
    with pytest.raises(UserError, match=r"has no function 'wantd'. Did you mean 'wanted'\?"):
        check(load(recipe)[0])


# Without training, and iterations


def test_sampling_alone_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`po sample` writes what `po train` reads, and goes on where it was cut off."""
    made: list[Any] = []
    monkeypatch.setattr(po.sample, "build", lambda *args: made.append(build(*args)) or made[-1])
    recipe = online(tmp_path, {"head": "infonca"})
    po.sample.sample(load(recipe)[0])
    made.pop().lock.release()
    rows = tmp_path / "run/rollouts/rank0.jsonl"
    lines = rows.read_text().splitlines()
    assert sorted(x["example"] for x in journal(tmp_path / "run")) == list(range(12))
    rows.write_text("\n".join(lines[:5]) + "\n" + lines[5][:50])
    po.sample.sample(load(recipe, ["resume=true"])[0])
    made.pop().lock.release()
    assert sorted(rows.read_text().splitlines()) == sorted(lines)
    offline = online(tmp_path, {"head": "infonca"}, out="trained", rows=rows)
    said = yaml.safe_load(offline.read_text())
    del said["rollout"]
    offline.write_text(yaml.safe_dump(said))
    trained(offline)
    assert metrics(tmp_path / "trained")[0]["loss/infonca"] > 0


def test_two_rankings_agree_or_not(tmp_path: Path) -> None:
    """CREAM: the consistency of two rewards' rankings becomes the row's column."""
    (tmp_path / "two.py").write_text(
        "def now(completions, **c):\n    return [float(len(t)) for t in completions]\n"
        "def before(completions, **c):\n    return [-float(len(t)) for t in completions]\n"
    )
    rewards = [f"{tmp_path}/two.py:now", {"function": f"{tmp_path}/two.py:before", "weight": 0.0}]
    rollout = {"rewards": rewards, "consistency": ["now", "before"]}
    trained(online(tmp_path, {"head": "cream"}, rollout=rollout))
    assert metrics(tmp_path / "run")[0]["cream/consistency"] < 0.2
    assert consistency(answers([0.9, 0.1, 0.5, 0.3, 0.7], [0.8, 0.2, 0.1, 0.4, 0.9]), "a", "b") == 0.7


def answers(first: list[float], second: list[float]) -> list[Answer]:
    return [Answer((5,), "", "policy", parts={"a": a, "b": b}) for a, b in zip(first, second, strict=True)]


def test_check_counts_every_time_that_a_round_is_taken(tmp_path: Path) -> None:
    recipe = load(online(tmp_path, rollout={"num_iterations": 3}))[0]
    assert "one rank makes 9 steps of 4 per epoch" in check(recipe)
