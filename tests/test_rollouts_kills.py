"""kill -9 of runs that sample, then the same command again: nothing is sampled twice or lost, and the weights are those
of the uninterrupted run, bit for bit."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Job
from online_support import metrics, online
from safetensors.torch import load_file
from test_rollouts_ranks import journals

from po.callbacks import Watchdog
from po.recipe import load
from po.rollout.draw import Draw, Place
from po.run import build

ZERO2, ZERO3 = ("deepspeed=zero2",), ("deepspeed=zero3",)


def attack(point: str, rank: int) -> None:
    """Have one rank killed by the kernel: in the second round, in the last of 8 steps, or in the save of step 6."""
    from po import checkpoint
    from po.rollout.journal import Journal
    from po.trainer import POTrainer

    if int(os.environ.get("RANK", "0")) != rank:
        return

    def die(*args: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def is_now(places: Any) -> bool:
        return bool(places) and (places[0].round, places[0].place) == (1, 5 if rank else 2)

    if point == "sampling":
        draw = Draw.__call__
        Draw.__call__ = lambda self, prompts, places, *a: die() if is_now(places) else draw(self, prompts, places, *a)
    elif point == "a line of the journal":
        write = Journal.write

        def half(self: Journal, rows: Any) -> None:
            before = self.path.stat().st_size
            write(self, rows)
            if rows and rows[0]["round"] == 1:
                os.truncate(self.path, (before + self.path.stat().st_size) // 2)
                die()

        Journal.write = half
    elif point == "training":
        step = POTrainer.training_step
        POTrainer.training_step = lambda self, *a, **k: die() if self.state.global_step == 7 else step(self, *a, **k)
    elif point == "the seal":
        real = checkpoint._write_manifest
        checkpoint._write_manifest = lambda f, m: die() if f.name == "checkpoint-6" else real(f, m)
    elif point == "between two files":
        save = torch.save
        torch.save = lambda x, f, *a, **k: die() if "checkpoint-6/" in str(f) else save(x, f, *a, **k)
    elif point == "what was known of the round":
        from po.rollout import before

        kept = before.save
        before.save = lambda f, *a: die() if f.name == "checkpoint-6" else kept(f, *a)


def train(words: list[str], point: str, rank: int) -> int:
    """launch/train.py's command."""
    attack(point, rank)
    from po.cli import main

    return main(["train", *words])


class World:
    """Recipes of one kind, and an uninterrupted run of each, shared by the tests of the session."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._whole: dict[tuple[Any, ...], Path] = {}
        self._jobs: list[Job] = []

    def job(
        self, out: str, head: str, words: tuple[str, ...], ranks: int, point: str = "", rank: int = 0, epochs: int = 1
    ) -> Job:
        """14 prompts, 4 a step and 8 a round that is taken twice: 8 steps, with checkpoints at 3 and 6, in the
        middle of both rounds. A call of the sampler has 2 groups."""
        recipe = online(
            self.folder,
            {"head": head},
            14,
            out,
            rollout={
                "num_generations": 2,
                "sequences_per_call": 4,
                "steps_per_generation": 2,
                "num_iterations": 2,
                "rewards": [f"{self.folder}/rewards.py:odd"],
                "zero_variance": "refill",
            },
            lora={"r": 4, "alpha": 8, "dropout": 0.1},
            train={
                "per_device_train_batch_size": 2 // ranks,
                "gradient_accumulation_steps": 2,
                "save_strategy": "steps",
                "save_steps": 3,
                "num_train_epochs": epochs,
            },
        )
        launched = ranks if ranks > 1 or words else 0
        job = Job(self.folder / f"{out}.log", train, [str(recipe), *words], point, rank, world=launched)
        self._jobs.append(job)
        return job

    def name(self) -> str:
        """Of a run that nobody has made yet."""
        return f"run-{len(self._jobs)}"

    def whole(self, head: str, words: tuple[str, ...], ranks: int, epochs: int = 1) -> Path:
        key = (head, words, ranks, epochs)
        if key not in self._whole:
            out = f"whole-{len(self._whole)}"
            job = self.job(out, head, words, ranks, epochs=epochs)
            assert job.wait() == [0] * ranks, job.said
            self._whole[key] = self.folder / out
        return self._whole[key]

    def close(self) -> None:
        for job in self._jobs:
            job.kill()


@pytest.fixture(scope="session")
def killed_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("kills"))
    yield made
    made.close()


def assert_same(run: Path, whole: Path, ranks: int) -> None:
    """The same samples with the same log-probs and rewards, each once; the same weights and losses."""
    for rank in range(ranks):
        a, b = ((p / "rollouts" / f"rank{rank}.jsonl").read_text().splitlines() for p in (run, whole))
        assert sorted(a) == sorted(b)
    assert journals(run, ranks) == journals(whole, ranks)
    a, b = (load_file(p / "adapter_model.safetensors") for p in (run, whole))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert any(v.abs().sum() > 0 for k, v in a.items() if "lora_B" in k)
    names = ("step", "loss", "grad_norm", "reward", "rollout/refilled", "rollout/staleness", "grpo/clip_high")
    lines = [[{n: m.get(n) for n in names} for m in metrics(p)] for p in (run, whole)]
    assert lines[0] == lines[1]
    assert sum(m["loss"] != 0 for m in lines[0] if m["loss"] is not None) > 4


SLOW = pytest.mark.slow
CASES = [
    ("grpo", (), 1, "a line of the journal"),
    ("grpo", (), 1, "the seal"),
    *(
        pytest.param("grpo", words, ranks, point, marks=SLOW)
        for words, ranks, points in (
            ((), 1, ("sampling", "training", "between two files", "what was known of the round")),
            ((), 2, ("sampling", "training")),
            (ZERO2, 2, ("sampling", "a line of the journal", "training", "the seal", "what was known of the round")),
            (ZERO3, 2, ("sampling", "training")),
        )
        for point in points
    ),
    *(pytest.param("ppo", words, 1, point, marks=SLOW) for words in ((), ZERO2) for point in ("sampling", "the seal")),
]


@pytest.mark.parametrize(("head", "words", "ranks", "point"), CASES)
def test_killed_then_resumed(killed_world: World, head: str, words, ranks: int, point: str) -> None:
    whole = killed_world.whole(head, words, ranks)
    assert sum(m.get("rollout/refilled", 0) for m in metrics(whole)) > 0
    out = killed_world.name()
    victim = 1 if ranks > 1 and point in ("sampling", "a line of the journal", "training") else 0
    words = (*words, "resume=true")
    killed = killed_world.job(out, head, words, ranks, point, victim)
    deadline = time.monotonic() + 120
    while killed.ranks[victim].exitcode is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert killed.ranks[victim].exitcode == -signal.SIGKILL, killed.said
    killed.kill()  # a launcher does so
    run = killed_world.folder / out
    if point == "a line of the journal":
        assert not (run / f"rollouts/rank{victim}.jsonl").read_bytes().endswith(b"\n")
    again = killed_world.job(out, head, words, ranks)
    assert again.wait() == [0] * ranks, again.said
    assert f"resuming from {run}/checkpoint-{6 if point == 'training' else 3}\n" in again.said
    assert_same(run, whole, ranks)


@pytest.mark.slow
@pytest.mark.parametrize(("words", "ranks"), [((), 1), (ZERO2, 2)])
def test_killed_again_and_again(killed_world: World, words: tuple[str, ...], ranks: int) -> None:
    """A kill after every new line of a journal or of the log, whatever is being done then; two epochs."""
    whole, out = killed_world.whole("grpo", words, ranks, epochs=2), killed_world.name()
    run = killed_world.folder / out
    for _ in range(16):
        before = _sizes(run)
        job = killed_world.job(out, "grpo", (*words, "resume=true"), ranks, epochs=2)
        while job.ranks[0].exitcode is None and _sizes(run) == before:
            time.sleep(0.005)
        job.kill()
        if job.ranks[0].exitcode == 0:
            break
    job = killed_world.job(out, "grpo", (*words, "resume=true"), ranks, epochs=2)
    assert job.wait() == [0] * ranks, job.said
    assert_same(run, whole, ranks)


def test_a_call_that_a_kill_cut_is_made_with_the_same_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other prompts in the call would round the missing sample's log-probs otherwise; what is there stays."""
    calls: list[list[Place]] = []
    draw = Draw.__call__
    monkeypatch.setattr(Draw, "__call__", lambda self, p, at, *a: (calls.append(list(at)), draw(self, p, at, *a))[1])
    for out in ("whole", "cut"):
        recipe = online(tmp_path, out=out, rollout={"sequences_per_call": 8}, train={"max_steps": 1})
        job = build(load(recipe)[0])
        job.trainer.train()
        assert [[p.place for p in call] for call in calls] == [[0, 1], [2, 3]]
        calls.clear()
    journal = tmp_path / "cut/rollouts/rank0.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:3]))
    recipe.write_text(recipe.read_text() + "resume: true\n")
    job.lock.release()
    build(load(recipe)[0]).trainer.train()
    assert [[p.place for p in call] for call in calls] == [[2, 3]]
    assert journal.read_text().splitlines(keepends=True) == lines


def test_a_long_round_is_not_taken_for_a_stall(tmp_path: Path) -> None:
    """The watchdog is told of every call of the sampler, and so is it in evaluation."""
    recipe = online(tmp_path, rollout={"sequences_per_call": 4}, train={"max_steps": 1, "eval_strategy": "steps"})
    text = recipe.read_text().replace("data:\n", f"data:\n  eval: {tmp_path / 'prompts.jsonl'}\n", 1)
    recipe.write_text(text)
    job = build(load(recipe)[0])
    beats: list[int] = []
    (dog,) = (c for c in job.trainer.callback_handler.callbacks if isinstance(c, Watchdog))
    real = dog.on_substep_end
    dog.on_substep_end = lambda *a, **k: (beats.append(a[1].global_step), real(*a, **k))[1]
    job.trainer.train()
    assert beats.count(0) == 4  # one group a call
    job.trainer.evaluate()
    assert beats.count(1) == 3 * 2  # 4 of the 12 prompts a call, at step 1 and now


def _sizes(run: Path) -> list[int]:
    files = [*sorted((run / "rollouts").glob("*.jsonl")), run / "metrics.jsonl"]
    return [f.read_bytes().count(b"\n") if f.exists() else 0 for f in files]
