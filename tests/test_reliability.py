"""The main job under attack: kills, damage, dead ranks, NaN rows, two runs in one folder.

Short jobs are forked (tests/forked.py) and run the command that launch/train.py runs; what needs a launcher uses the
real one.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Job, free_port
from safetensors.torch import load_file
from tiny import make_model, write_pairs, write_recipe

ROOT = Path(__file__).parents[1]
TRAIN = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "learning_rate": 0.01,
}


def attack(point: str) -> None:
    """Have this process killed by the kernel at a point inside the second save (step 4)."""
    from po import checkpoint

    def die(*args: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if point == "before the seal":
        real = checkpoint._write_manifest
        checkpoint._write_manifest = lambda f, m: die() if f.name == "checkpoint-4" else real(f, m)
    elif point == "between two files":
        save = torch.save
        torch.save = lambda x, f, *a, **k: die() if "checkpoint-4/" in str(f) else save(x, f, *a, **k)
    elif point == "after the seal":
        rotate = checkpoint.rotate
        checkpoint.rotate = lambda run, *a: die() if (run / "checkpoint-4").exists() else rotate(run, *a)


def train(words: list[str], point: str) -> int:
    """launch/train.py's command."""
    attack(point)
    from po.cli import main

    return main(["train", *words])


class World:
    """A model, rows and one uninterrupted run per kind of job, shared by the tests of the session."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = make_model(folder / "model")
        self.data = write_pairs(folder / "train.jsonl", 22)  # 5 full steps of 4 rows and a tail of 2, twice
        self._whole: dict[tuple[str, ...], Path] = {}
        self._jobs: list[Job] = []

    def job(self, out: Path, *words: str, point: str = "", world: int = 1, **changes: Any) -> Job:
        recipe = out.with_suffix(".yaml")
        lora = {"r": 4, "alpha": 8, "dropout": 0.1}
        settings = TRAIN | changes.pop("train", {})
        write_recipe(recipe, self.model, self.data, out, lora=lora, train=settings, **changes)
        launched = world if world > 1 or any(w.startswith("deepspeed=") for w in words) else 0
        job = Job(out.with_suffix(".log"), train, [str(recipe), *words], point, world=launched)
        self._jobs.append(job)
        return job

    def whole(self, *words: str, world: int = 1) -> Path:
        """The run folder of an uninterrupted run."""
        key = (*words, str(world))
        if key not in self._whole:
            out = self.folder / f"whole-{len(self._whole)}"
            job = self.job(out, *words, world=world)
            assert job.wait() == [0] * world, job.said
            self._whole[key] = out
        return self._whole[key]

    def close(self) -> None:
        for job in self._jobs:
            job.kill()


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("reliability"))
    yield made
    made.close()


def steps(run: Path) -> list[int]:
    return [json.loads(x)["step"] for x in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_end(run: Path, whole: Path) -> None:
    """Bit for bit the same adapter, optimizer and RNG state at the end; the same losses on the way; no line twice."""
    a, b = load_file(run / "adapter_model.safetensors"), load_file(whole / "adapter_model.safetensors")
    assert list(a) == list(b)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert any(v.abs().sum() > 0 for k, v in a.items() if "lora_B" in k)
    if (whole / "checkpoint-12" / "optimizer.pt").exists():
        mine, theirs = (torch.load(x / "checkpoint-12" / "optimizer.pt")["state"] for x in (run, whole))
        assert all(torch.equal(mine[i]["exp_avg"], theirs[i]["exp_avg"]) for i in theirs)
    assert steps(run) == steps(whole)
    lines = [[json.loads(x).get("loss") for x in (r / "metrics.jsonl").read_text().splitlines()] for r in (run, whole)]
    assert lines[0] == lines[1]


ZERO2 = ("deepspeed=zero2",)


@pytest.mark.parametrize(
    ("words", "ranks", "point"),
    [
        ((), 1, "before the seal"),
        (ZERO2, 1, "between two files"),
        pytest.param((), 1, "between two files", marks=pytest.mark.slow),
        pytest.param((), 1, "after the seal", marks=pytest.mark.slow),
        pytest.param(ZERO2, 1, "before the seal", marks=pytest.mark.slow),
        pytest.param((), 2, "before the seal", marks=pytest.mark.slow),
        pytest.param(ZERO2, 2, "before the seal", marks=pytest.mark.slow),
        pytest.param(("deepspeed=zero3",), 1, "between two files", marks=pytest.mark.slow),
        pytest.param(("deepspeed=zero3",), 2, "before the seal", marks=pytest.mark.slow),
    ],
)
def test_killed_inside_a_save_then_resumed(world: World, tmp_path: Path, words, ranks, point):
    """kill -9 in the second save, the same command with resume: the weights of the uninterrupted run, bit for bit."""
    whole = world.whole(*words, world=ranks)
    run = tmp_path / "run"
    killed = world.job(run, *words, "resume=true", point=point, world=ranks)
    deadline = time.monotonic() + 120
    while killed.ranks[0].exitcode is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert killed.ranks[0].exitcode == -signal.SIGKILL, killed.said
    killed.kill()  # a launcher does so; and a second run must not have to wait for the first one's remains
    before = killed.said
    again = world.job(run, *words, "resume=true", world=ranks)
    assert again.wait() == [0] * ranks, again.said
    said = again.said[len(before) :]
    if point == "after the seal":
        assert f"resuming from {run}/checkpoint-4" in said
    else:
        assert (
            f"checkpoint {run}/checkpoint-4 is broken: the run ended while saving it. It is set aside as "
            "checkpoint-4.unfinished-1 and not used."
        ) in said
        assert f"resuming from {run}/checkpoint-2" in said
    assert_same_end(run, whole)
    assert not list(run.glob("*.unfinished-*"))


@pytest.mark.parametrize("damage", ["flip", pytest.param("truncate", marks=pytest.mark.slow)])
def test_a_damaged_checkpoint_is_skipped(world: World, tmp_path: Path, damage: str):
    whole, run = world.whole(), tmp_path / "run"
    shutil.copytree(whole, run)
    target = run / "checkpoint-12" / "adapter_model.safetensors"
    data = bytearray(target.read_bytes())
    if damage == "flip":
        data[-5] ^= 4
        reason = "adapter_model.safetensors is not what was saved (its SHA-256 differs)"
    else:
        data = data[:-100]
        reason = f"adapter_model.safetensors has {len(data)} bytes, not the {len(data) + 100} that were saved"
    target.write_bytes(data)
    (run / "adapter_model.safetensors").unlink()
    job = world.job(run, "resume=true")
    assert job.wait() == [0], job.said
    assert f"checkpoint {run}/checkpoint-12 is broken: {reason}. It is set aside as" in job.said
    assert f"resuming from {run}/checkpoint-10" in job.said
    assert_same_end(run, whole)


def test_a_folder_with_a_run_is_refused_without_resume_and_while_it_is_written(world: World, tmp_path: Path):
    from po.folder import RunLock

    whole, run = world.whole(), tmp_path / "run"
    job = world.job(whole)
    assert job.wait() == [2]
    assert f"po: output_dir: {whole} already has a run (it holds checkpoint-12) and resume is off." in job.said
    lock = RunLock(run, False)
    job = world.job(run, "resume=true")
    assert job.wait() == [2]
    assert f"po: output_dir: another run is writing {run} (process {os.getpid()} on " in job.said
    lock.release()


def test_a_changed_recipe_does_not_go_on_with_an_old_checkpoint(world: World, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(world.whole(), run)
    job = world.job(run, "resume=true", "train.per_device_train_batch_size=1")
    assert job.wait() == [2]
    assert "  per_device_train_batch_size: saved with 2, now 1\nPut these back to continue it" in job.said


def poison(model: Path, out: Path, token: str) -> Path:
    """A copy of the model whose embedding of one word is NaN: the row that holds the word is the planted row."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, net = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    net.get_input_embeddings().weight.data[tokenizer.convert_tokens_to_ids(token)] = float("nan")
    net.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


@pytest.mark.parametrize(
    ("words", "ranks", "step", "guilty"),
    [
        ((), 1, 4, 0),
        pytest.param((), 2, 2, 1, marks=pytest.mark.slow),
        pytest.param(ZERO2, 2, 2, 1, marks=pytest.mark.slow),
        pytest.param(("deepspeed=zero3",), 2, 2, 1, marks=pytest.mark.slow),
    ],
)
def test_a_nan_row_stops_all_ranks_with_exit_code_4_and_its_name(world, tmp_path: Path, words, ranks, step, guilty):
    rows = [json.loads(x) for x in world.data.read_text().splitlines()]
    rows = [json.loads(re.sub(r"\bw59\b", "w58", json.dumps(r))) for r in rows]
    rows[14]["chosen"] += " w59 w1"
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({k: r[k] for k in ("id", "prompt", "chosen", "rejected")}) + "\n" for r in rows))
    run, model = tmp_path / "run", poison(world.model, tmp_path / "nan", "w59")
    job = world.job(
        run,
        *words,
        f"model.name_or_path={model}",
        f"data.train={data}",
        "train.train_sampling_strategy=sequential",
        world=ranks,
        loss=[{"head": "sft"}],
        reference={"from": "none"},
    )
    assert job.wait() == [4] * ranks, job.said
    assert f"po: step {step}: NaN or Inf, so the step was not taken and the weights are as after step" in job.said
    assert f"  rank {guilty}, micro-batch 1: loss and gradient not finite; rows pair-14\n" in job.said
    assert (run / f"nonfinite-step-{step}.safetensors").exists()
    assert steps(run) == list(range(1, step))
    assert not (run / f"checkpoint-{step}").exists()


def test_metrics_have_the_promised_names(world: World):
    lines = [json.loads(x) for x in (world.whole() / "metrics.jsonl").read_text().splitlines()]
    promised = {"loss", "grad_norm", "learning_rate", "epoch", "num_tokens", "rewards/chosen", "rewards/rejected"}
    promised |= {"rewards/margins", "rewards/accuracies", "rewards/ties", "logps/chosen", "logps/rejected", "entropy"}
    promised |= {"mean_token_accuracy", "kl/seq", "kl/token", "lengths/chosen", "lengths/rejected", "loss/dpo"}
    promised |= {"perf/tokens_per_s", "perf/mfu", "perf/peak_gib"}
    assert promised <= set(lines[1])
    assert "init/ref_gap" in lines[0]
    assert lines[0]["rewards/ties"] == pytest.approx(1.0) or abs(lines[0]["rewards/margins"]) < 1e-4
    for name in ("recipe.resolved.yaml", "environment.json", "data_report.json"):
        assert (world.whole() / name).exists()


# With the real launcher


def launch(recipe: Path, ranks: int, log: Path, *words: str) -> subprocess.Popen[bytes]:
    deepspeed = Path(sys.executable).with_name("deepspeed")
    cmd = [str(deepspeed), "--num_accelerators", str(ranks), "--master_port", str(free_port())]
    cmd += [str(ROOT / "launch" / "train.py"), str(recipe), *words]
    env = os.environ | {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{deepspeed.parent}:{os.environ['PATH']}",
    }
    with log.open("w") as f:
        return subprocess.Popen(cmd, stdout=f, stderr=f, env=env, start_new_session=True, cwd=ROOT)


def end(job: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(job.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    finally:
        job.wait()


def ranks_of(run: Path) -> dict[int, int]:
    """rank -> process id of the workers that train the recipe beside `run`."""
    found = {}
    for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = cmdline.read_bytes().decode(errors="replace").split("\0")
            zombie = (cmdline.parent / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            continue
        rank = [w.partition("=")[2] for w in words if w.startswith("--local_rank=")]
        if rank and not zombie and str(run.with_suffix(".yaml")) in words:
            found[int(rank[0])] = int(cmdline.parent.name)
    return found


def wait_for(path: Path, job: subprocess.Popen[bytes], log: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert job.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


def launched(world: World, tmp_path: Path, **settings: Any) -> tuple[Path, Path, subprocess.Popen[bytes]]:
    run, log = tmp_path / "run", tmp_path / "launch.log"
    recipe = run.with_suffix(".yaml")
    write_recipe(recipe, world.model, world.data, run, train=TRAIN | settings)
    return run, log, launch(recipe, 2, log)


def test_a_dead_rank_ends_the_job(world: World, tmp_path: Path):
    """deepspeed, 2 ranks, kill -9 of one: an error within a minute, and nobody left behind."""
    run, log, job = launched(world, tmp_path, num_train_epochs=2000, save_steps=10**6)
    try:
        wait_for(run / "metrics.jsonl", job, log)
        workers = ranks_of(run)
        assert sorted(workers) == [0, 1]
        os.kill(workers[1], signal.SIGKILL)
        start = time.monotonic()
        assert job.wait(60) != 0
        assert time.monotonic() - start < 60
        time.sleep(0.5)
        assert ranks_of(run) == {}
    finally:
        end(job)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["launcher", "rank"])
def test_sigterm_saves_and_leaves(world: World, tmp_path: Path, target: str):
    """SIGTERM to deepspeed's launcher or to one rank: a sealed checkpoint of that step, and nobody left behind."""
    run, log, job = launched(world, tmp_path, num_train_epochs=2000, save_steps=10**6)
    try:
        wait_for(run / "metrics.jsonl", job, log)
        workers = ranks_of(run)
        parent = int(Path(f"/proc/{workers[0]}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(parent if target == "launcher" else workers[1], signal.SIGTERM)
        job.wait(60)
        from po.checkpoint import checkpoints, why_broken

        (saved,) = checkpoints(run)
        assert why_broken(saved) is None
        assert steps(run)[-1] <= int(saved.name.partition("-")[2])
        assert "saving at step" in log.read_text()
        time.sleep(0.5)
        assert ranks_of(run) == {}
    finally:
        end(job)


@pytest.mark.slow
def test_a_stopped_rank_is_noticed(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """SIGSTOP of one rank: the other's watchdog ends the job within its limit."""
    monkeypatch.setenv("PO_WATCHDOG_SECONDS", "10")
    run, log, job = launched(world, tmp_path, num_train_epochs=2000, save_steps=10**6)
    try:
        wait_for(run / "metrics.jsonl", job, log)
        os.kill(ranks_of(run)[1], signal.SIGSTOP)
        assert job.wait(90) != 0
        assert "watchdog: rank 0: nothing has moved for 10 s after step" in log.read_text()
    finally:
        end(job)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "ranks", "kills"), [((), 1, 20), (ZERO2, 1, 20), (("deepspeed=zero3",), 1, 10), (ZERO2, 2, 10)]
)
def test_random_kills(world: World, tmp_path: Path, words, ranks, kills):
    """kill -9 of one rank or all, at random moments, a third of them inside a save; every run that gets through in the
    end has the weights of the uninterrupted one."""
    whole, rng, done, inside = world.whole(*words, world=ranks), random.Random(7), 0, 0
    run = tmp_path / "run-0"
    while done < kills:
        job = world.job(run, *words, "resume=true", world=ranks)
        in_save, lines = rng.random() < 0.4, logged(run)
        while job.ranks[0].exitcode is None:
            if in_save and list(run.glob("checkpoint-*[0-9]/saving")):
                break
            if not in_save and logged(run) != lines:
                break
        time.sleep(rng.random() * (0.02 if in_save else 0.1))
        rng.choice(job.ranks).kill()
        job.kill()
        if job.ranks[0].exitcode == 0:
            assert_same_end(run, whole)
            run = tmp_path / f"run-{done}"
            continue
        done += 1
        inside += bool(list(run.glob("checkpoint-*[0-9]/saving")))
    job = world.job(run, *words, "resume=true", world=ranks)
    assert job.wait() == [0] * ranks, job.said
    assert_same_end(run, whole)
    assert inside >= kills // 5


def logged(run: Path) -> int:
    return (run / "metrics.jsonl").read_bytes().count(b"\n") if (run / "metrics.jsonl").exists() else 0
