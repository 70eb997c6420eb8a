"""Checkpoints: sealed or named as broken, never removed too early; the run folder's lock; what a run records."""

import json
import os
import pickle
import resource
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from forked import Job
from safetensors.torch import save_file

from po.checkpoint import (
    MANIFEST,
    SaveError,
    check_same,
    checkpoints,
    newest_sound,
    rotate,
    saved_meta,
    seal,
    sealed_save,
    why_broken,
)
from po.errors import UserError
from po.folder import RunLock, environment, redact
from po.hardening import refuse_pickles

META = {"step": 1, "ranks": 2}


def write(folder: Path, text: str = "weights") -> None:
    (folder / "global_step1").mkdir(parents=True, exist_ok=True)
    (folder / "model.bin").write_text(text)
    (folder / "global_step1" / "optimizer.bin").write_text(text * 3)


def save(run: Path, step: int, keep: int | None = None, best: str | None = None) -> Path:
    folder = run / f"checkpoint-{step}"
    sealed_save(folder, lambda: write(folder), META, keep, best)
    return folder


def test_a_sealed_checkpoint_is_sound_and_says_what_it_was_saved_with(tmp_path: Path):
    folder = save(tmp_path, 3)
    assert why_broken(folder) is None
    assert newest_sound(tmp_path) == folder
    assert saved_meta(folder) == META
    assert sorted(json.loads((folder / MANIFEST).read_text())["files"]) == ["global_step1/optimizer.bin", "model.bin"]
    assert not (folder / "saving").exists()


def truncate(folder: Path) -> None:
    os.truncate(folder / "model.bin", 3)


def flip(folder: Path) -> None:
    data = bytearray((folder / "model.bin").read_bytes())
    data[2] ^= 1
    (folder / "model.bin").write_bytes(data)


def lose(folder: Path) -> None:
    (folder / "global_step1" / "optimizer.bin").unlink()


def garble(folder: Path) -> None:
    (folder / MANIFEST).write_text("{}")


def unseal(folder: Path) -> None:
    (folder / MANIFEST).unlink()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, "model.bin has 3 bytes, not the 7 that were saved"),
        (flip, "model.bin is not what was saved (its SHA-256 differs)"),
        (lose, "global_step1/optimizer.bin is missing"),
        (garble, "manifest.json cannot be read (KeyError: 'files')"),
        (unseal, "it has no manifest.json, so nothing says that it is whole"),
    ],
)
def test_a_broken_checkpoint_is_named_and_set_aside(tmp_path: Path, damage, reason):
    older, newer = save(tmp_path, 9), save(tmp_path, 10)
    damage(newer)
    assert why_broken(newer) == reason
    said: list[str] = []
    assert newest_sound(tmp_path, said.append) == older
    assert said == [
        f"checkpoint {newer} is broken: {reason}. It is set aside as checkpoint-10.broken-1 and not used.\n"
    ]
    assert checkpoints(tmp_path) == [older]
    assert (tmp_path / "checkpoint-10.broken-1" / "model.bin").exists()
    assert newest_sound(tmp_path, said.append) == older
    assert len(said) == 1


def test_a_killed_save_is_set_aside_and_removed_by_the_next_seal(tmp_path: Path):
    first = save(tmp_path, 1)

    def killed() -> None:
        write(tmp_path / "checkpoint-2")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sealed_save(tmp_path / "checkpoint-2", killed, META, 1)
    assert why_broken(tmp_path / "checkpoint-2") == "the run ended while saving it"
    assert first.exists()
    assert newest_sound(tmp_path, lambda _: None) == first
    assert (tmp_path / "checkpoint-2.unfinished-1").exists()
    second = save(tmp_path, 2, keep=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == [second.name]


def test_older_ones_go_only_after_the_seal(tmp_path: Path):
    seen: list[list[str]] = []

    def look(folder: Path) -> None:
        write(folder)
        seen.append(sorted(p.name for p in checkpoints(tmp_path) if why_broken(p) is None))

    for step in (8, 9, 10):
        folder = tmp_path / f"checkpoint-{step}"
        sealed_save(folder, lambda f=folder: look(f), META, 1)
    assert seen == [[], ["checkpoint-8"], ["checkpoint-9"]]
    assert checkpoints(tmp_path) == [tmp_path / "checkpoint-10"]


def test_rotation_keeps_the_best_and_what_was_damaged(tmp_path: Path):
    best = save(tmp_path, 1)
    truncate(save(tmp_path, 2))
    newest_sound(tmp_path, lambda _: None)
    for step in (3, 4, 5):
        save(tmp_path, step, keep=2, best=str(best))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoint-1",
        "checkpoint-2.broken-1",
        "checkpoint-4",
        "checkpoint-5",
    ]
    rotate(tmp_path, 0)
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-5"]


def test_a_sealed_checkpoint_of_the_same_step_stays(tmp_path: Path):
    folder = save(tmp_path, 1)
    sealed_save(folder, lambda: pytest.fail("written again"), META, None)
    assert why_broken(folder) is None


@pytest.mark.parametrize("kind", ["torch", "safetensors", "json"])
def test_a_full_disk_is_said_and_costs_nothing(tmp_path: Path, kind: str):
    """The limit on file sizes stands in for the disk: every writer's own error is caught."""
    first, folder, x = save(tmp_path, 1), tmp_path / "checkpoint-2", torch.zeros(1 << 16)

    def fill() -> None:
        if kind == "torch":
            torch.save({"x": x}, folder / "optimizer.pt")
        elif kind == "safetensors":
            save_file({"x": x}, folder / "model.safetensors")
        else:
            (folder / "trainer_state.json").write_text("x" * (1 << 18))

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(SaveError, match=r"checkpoint-2: the checkpoint could not be saved: .* MiB are free") as e:
            sealed_save(folder, fill, META, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "The checkpoints before it are untouched. Make room" in str(e.value)
    assert newest_sound(tmp_path) == first
    assert not folder.exists()
    assert why_broken(save(tmp_path, 2)) is None


def test_other_errors_of_a_save_are_not_dressed_up(tmp_path: Path):
    def fail() -> None:
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        sealed_save(tmp_path / "checkpoint-1", fail, META, None)


def test_going_on_under_other_conditions_is_refused(tmp_path: Path):
    folder = save(tmp_path, 1)
    check_same(folder, {"ranks": 2})
    with pytest.raises(UserError) as e:
        check_same(folder, {"step": 1, "ranks": 1})
    assert "  ranks: saved with 2, now 1\nPut these back to continue it, or start a new run" in str(e.value)


def two_ranks(run: Path) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for step in (1, 2):
        folder = run / f"checkpoint-{step}"
        sealed_save(folder, lambda f=folder: (f / f"part-{rank}").write_text("x" * 9), {"step": step}, None)
    dist.barrier()
    if rank == 1:
        (run / "checkpoint-2" / "part-1").write_text("x")
    dist.barrier()
    assert newest_sound(run) == run / "checkpoint-1"
    with pytest.raises(SaveError):
        seal(run / "nowhere", {})


def test_ranks_agree(tmp_path: Path):
    job = Job(tmp_path / "log", two_ranks, tmp_path / "run", world=2)
    assert job.wait(60) == [0, 0], job.said
    assert (
        job.said.count("part-1 has 1 bytes, not the 9 that were saved. It is set aside as checkpoint-2.broken-1") == 1
    )


# The run folder


def hold(run: Path) -> None:
    lock = RunLock(run, False)
    (run / "held").touch()
    time.sleep(60)
    lock.release()


def test_a_second_run_is_refused_while_the_first_lives(tmp_path: Path):
    run = tmp_path / "run"
    first = Job(tmp_path / "log", hold, run)
    try:
        deadline = time.monotonic() + 60
        while not (run / "held").exists():
            assert time.monotonic() < deadline, first.said
            time.sleep(0.02)
        with pytest.raises(UserError) as e:
            RunLock(run, resume=True)
        assert f"another run is writing {run} (process {first.ranks[0].pid} on " in str(e.value)
        assert "Wait for it or stop it, or set another output_dir." in str(e.value)
    finally:
        first.kill()
    RunLock(run, resume=False).release()


def test_a_worker_does_not_keep_the_lock_of_a_dead_run(tmp_path: Path):
    lock = RunLock(tmp_path, False)
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    try:
        time.sleep(0.1)
        lock.release()
        RunLock(tmp_path, False).release()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_folder_with_a_run_needs_resume(tmp_path: Path):
    save(tmp_path, 7)
    with pytest.raises(UserError) as e:
        RunLock(tmp_path, resume=False)
    assert str(e.value) == (
        f"output_dir: {tmp_path} already has a run (it holds checkpoint-7) and resume is off. Set resume=true to "
        "continue it, or set another output_dir."
    )
    RunLock(tmp_path, resume=True).release()


def test_only_rank_0_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lock = RunLock(tmp_path, False)
    monkeypatch.setenv("RANK", "1")
    RunLock(tmp_path, False)
    lock.release()


def test_secrets_are_redacted():
    assert redact({"api_key": "abc", "hub_token": "x", "tokenizer": "gpt2", "max_tokens": 5, "empty_key": ""}) == {
        "api_key": "[redacted]",
        "hub_token": "[redacted]",
        "tokenizer": "gpt2",
        "max_tokens": 5,
        "empty_key": "",
    }
    assert redact(["https://me:pw@host/x", "run hf_abcdefghijklmnopqrstuv now"]) == [
        "https://[redacted]@host/x",
        "run [redacted] now",
    ]


def test_environment_tells_versions_and_no_secrets(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setattr(sys, "argv", ["train.py", "recipe.yaml", "hub_token=abc", "lr=1e-5"])
    env = environment()
    assert (
        env["packages"]["torch"] == torch.__version__.partition("+")[0] or env["packages"]["torch"] == torch.__version__
    )
    assert env["variables"]["NCCL_DEBUG"] == "INFO"
    assert env["variables"]["WANDB_API_KEY"] == "[redacted]"
    assert "abc" not in env["command"]
    assert env["command"].endswith("lr=1e-5")
    assert env["code"] is None or len(env["code"]["commit"]) == 40
    json.dumps(env)


class Evil:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.trace}",)


def test_deepspeed_runs_no_code_from_a_checkpoint(tmp_path: Path):
    refuse_pickles()
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    torch.save({"module": Evil(tmp_path / "ran")}, tmp_path / "states.pt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        TorchCheckpointEngine().load(str(tmp_path / "states.pt"))
    torch.save({"module": {"w": torch.ones(2)}, "ds_config": {}, "names": {"a"}}, tmp_path / "states.pt")
    assert TorchCheckpointEngine().load(str(tmp_path / "states.pt"))["names"] == {"a"}
    assert not (tmp_path / "ran").exists()


def test_an_unsealed_folder_is_not_sealed_by_hand(tmp_path: Path):
    folder = tmp_path / "checkpoint-4"
    write(folder)
    assert newest_sound(tmp_path, lambda _: None) is None
    folder = tmp_path / "checkpoint-5"
    write(folder)
    seal(folder, {})
    assert newest_sound(tmp_path) == folder
