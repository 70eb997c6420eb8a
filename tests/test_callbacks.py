"""What watches over a run: real Trainers, real signals, real wandb."""

import json
import os
import re
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forked import Job
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import integration_utils
from transformers.trainer_callback import TrainerControl, TrainerState

from po.callbacks import GracefulStop, NonFinite, Watchdog
from po.errors import NumericsError, UserError
from po.logs import MetricsFile, Progress, line
from po.trackers import SafeTrackers
from po.types import HeadInput, Segments


class Net(nn.Module):
    """Two weights, one of them out of the loss's sight in half of the micro-batches."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.a * x).sum(-1) + (self.b * x[:, :1].clamp(min=1e-30).sqrt()).sum(-1)


class Small(Trainer):
    """Rows are (id, x); the guard sees log-probs that are the net's outputs."""

    loss_is_scaled_for_ga = True

    def __init__(self, *args, guard: NonFinite | None = None, **kwargs) -> None:
        super().__init__(*args, data_collator=list, **kwargs)
        self.guard = guard

    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def _prepare_inputs(self, inputs):
        return inputs

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        x = torch.tensor([i["x"] for i in inputs])
        out_T = model(x)
        loss = out_T.mean()
        if self.guard is not None:
            n = len(inputs)
            seg = Segments(torch.arange(n), torch.ones(n, 1, dtype=torch.bool))
            self.guard.watch([i["id"] for i in inputs], HeadInput(seg, out_T), loss)
        return loss


def rows(n: int, odd: dict[int, list[float]] | None = None) -> list[dict]:
    return [{"id": f"row-{i}", "x": (odd or {}).get(i, [1.0, 2.0, 3.0])} for i in range(n)]


def trainer(tmp_path: Path, data: list[dict], callbacks: list, guard: NonFinite | None = None, **kw) -> Small:
    args = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 1}
    args |= {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1, "use_cpu": True}
    args |= {"remove_unused_columns": False, "logging_nan_inf_filter": False, "learning_rate": 0.1}
    out = Small(Net(), TrainingArguments(str(tmp_path), **args | kw), train_dataset=data, guard=guard)
    for callback in callbacks:
        out.add_callback(callback)
    return out


# NaN and Inf


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_nan_row_stops_before_the_weights_change(tmp_path: Path, clip: float):
    guard = NonFinite(tmp_path)
    t = trainer(tmp_path, rows(12, {6: [float("nan")] * 3}), [guard], guard, max_grad_norm=clip)
    seen: list[torch.Tensor] = []

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kw):
            seen.append(model.a.detach().clone())

    t.add_callback(Look())
    with pytest.raises(NumericsError) as e:
        t.train()
    assert str(e.value) == (
        "step 2: NaN or Inf, so the step was not taken and the weights are as after step 1.\n"
        "  rank 0, micro-batch 1: loss and gradient not finite; rows row-6\n"
        f"What the heads saw is in {tmp_path}/nonfinite-step-2.safetensors, explained in nonfinite-step-2.json.\n"
        "Look at these rows first; then try a lower learning rate or max_grad_norm, or bfloat16 in place of float16, "
        "and resume from the last checkpoint."
    )
    assert e.value.exit_code == 4
    assert torch.equal(t.model.a, seen[-1])
    assert len(seen) == 2
    assert t.model.a.isfinite().all()
    kept = load_file(tmp_path / "nonfinite-step-2.safetensors")
    assert kept["rank0.micro1.policy_T"].isnan().tolist() == [True, False]
    facts = json.loads((tmp_path / "nonfinite-step-2.json").read_text())
    assert facts[0]["ids"] == ["row-6", "row-7"]


def test_a_gradient_that_overflows_behind_a_finite_loss_stops(tmp_path: Path):
    """sqrt'(0) is infinite; the row's loss is not. No row is guilty by its inputs, so the micro-batch's are named."""

    class Root(Net):
        def forward(self, x):
            return (self.a * x).sum(-1) + (self.b - 1).abs().sum().sqrt() * (x[:, 0] < 0)

    guard = NonFinite(tmp_path)
    t = trainer(tmp_path, rows(8, {1: [-1.0, 0, 0]}), [guard], guard)
    t.model = t.model_wrapped = Root()
    with pytest.raises(NumericsError, match="micro-batch 0: gradient not finite; rows row-0, row-1\n"):
        t.train()
    assert t.model.a.tolist() == [1.0] * 3


def test_a_finite_run_is_left_alone_and_the_hooks_go(tmp_path: Path):
    guard = NonFinite(tmp_path)
    t = trainer(tmp_path, rows(8), [guard], guard)
    t.train()
    plain = trainer(tmp_path, rows(8), [])
    plain.train()
    assert torch.equal(t.model.a, plain.model.a)
    assert not t.model.a._backward_hooks
    assert not list(tmp_path.glob("nonfinite*"))


def zero(stage: int, out: Path, dtype: str) -> None:
    from deepspeed.utils import safe_get_full_fp32_param

    from po.hardening import keep_shm_clean

    keep_shm_clean()
    bf16, seen, guard = dtype == "bf16", [], NonFinite(out)
    config = {"zero_optimization": {"stage": stage}, "train_micro_batch_size_per_gpu": "auto"}
    config |= {"gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "bf16": {"enabled": bf16}}

    def full(p: nn.Parameter) -> torch.Tensor:
        return (safe_get_full_fp32_param(p) if stage else p.data).clone()

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kw):
            seen.append(full(model.a))

    t = trainer(out, rows(8, {5: [float("nan")] * 3}), [guard], guard, deepspeed=config, bf16=bf16)
    t.callback_handler.callbacks.insert(0, Look())
    with pytest.raises(NumericsError, match="rank 0, micro-batch 0: loss and gradient not finite; rows row-5\n"):
        t.train()
    now = full(t.model.a)
    assert torch.equal(now, seen[0])
    assert now.isfinite().all()


@pytest.mark.parametrize(
    ("stage", "dtype"),
    [
        pytest.param(0, "fp32", marks=pytest.mark.slow),
        pytest.param(1, "fp32", marks=pytest.mark.slow),
        (2, "fp32"),
        pytest.param(3, "fp32", marks=pytest.mark.slow),
        pytest.param(0, "bf16", marks=pytest.mark.slow),
        pytest.param(2, "bf16", marks=pytest.mark.slow),
        pytest.param(3, "bf16", marks=pytest.mark.slow),
    ],
)
def test_deepspeed_stops_before_the_weights_change(tmp_path: Path, stage: int, dtype: str):
    before = set(Path("/dev/shm").glob("deepspeed*"))
    job = Job(tmp_path / "log", zero, stage, tmp_path, dtype, world=1)
    assert job.wait() == [0], job.said
    assert set(Path("/dev/shm").glob("deepspeed*")) <= before


# Stop on request


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_saves_and_leaves_at_the_step_end(tmp_path: Path, number: int, capfd: pytest.CaptureFixture):
    stop = GracefulStop()

    class Send(TrainerCallback):
        def on_substep_end(self, args, state, control, **kw):
            if state.global_step == 1:
                os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    t = trainer(tmp_path, rows(40), [stop, Send()], save_strategy="steps", save_steps=100)
    t.train()
    assert stop.stopped
    assert t.state.global_step == 2
    assert (tmp_path / "checkpoint-2" / "trainer_state.json").exists()
    assert signal.getsignal(number) is before
    assert f"rank 0: {signal.Signals(number).name}: saving at step 2 and leaving\n" in capfd.readouterr().err


def launcher(out: Path) -> None:
    """Starts a rank, which runs until its GracefulStop says so."""
    if os.fork():
        os.wait()
        return
    stop, end = GracefulStop(), time.monotonic() + 60
    args, state = SimpleNamespace(device="cpu"), SimpleNamespace(global_step=7)
    control = SimpleNamespace(should_save=False, should_training_stop=False)
    stop.on_train_begin(args, state, control)
    while not control.should_training_stop and time.monotonic() < end:
        stop.on_step_end(args, state, control)
        (out / "alive").touch()
        time.sleep(0.05)
    if stop.stopped and control.should_save:
        (out / "left").touch()
    os._exit(0)


def test_a_vanished_launcher_stops_the_run(tmp_path: Path):
    """The rank's parent is killed; the rank notices at its next step end."""
    job = Job(tmp_path / "log", launcher, tmp_path, world=1)
    try:
        wait_for(tmp_path / "alive")
        time.sleep(0.2)
        assert not (tmp_path / "left").exists()
        job.ranks[0].kill()
        job.ranks[0].join(10)
        wait_for(tmp_path / "left")
    finally:
        job.kill()


def wait_for(path: Path, seconds: float = 40) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.05)


def stuck() -> None:
    dog = Watchdog(0.5)
    dog.on_train_begin(None, SimpleNamespace(global_step=0), None)
    for step in range(3):
        time.sleep(0.3)
        dog.on_step_end(None, SimpleNamespace(global_step=step), None)
    threading.Event().wait()


def test_the_watchdog_ends_a_run_that_hangs(tmp_path: Path):
    job = Job(tmp_path / "log", stuck)
    assert job.wait(30) == [1]
    assert "watchdog: rank 0: nothing has moved for 0.5 s after step 2. The stacks of all threads follow" in job.said
    assert "in stuck" in job.said


def test_the_watchdog_rests_when_the_run_is_over(tmp_path: Path):
    trainer(tmp_path, rows(8), [Watchdog(0.5)]).train()
    time.sleep(0.8)
    assert not [t for t in threading.enumerate() if t.name == "watchdog"]


def test_the_watchdog_reads_its_limit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PO_WATCHDOG_SECONDS", "77")
    assert Watchdog()._seconds == 77
    assert Watchdog(3)._seconds == 3


# Log lines


def read(tmp_path: Path) -> list[dict]:
    return [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]


def test_metrics_file_has_one_line_per_log_and_no_duplicates_after_a_resume(tmp_path: Path):
    kw = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 2}
    trainer(tmp_path, rows(12), [MetricsFile(tmp_path)], **kw).train()
    whole = read(tmp_path)
    assert [x["step"] for x in whole] == [1, 2, 3, 4, 5, 6, 6]
    assert set(whole[0]) >= {"step", "epoch", "time", "loss", "grad_norm", "learning_rate"}
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 6, "lo')
    trainer(tmp_path, rows(12), [MetricsFile(tmp_path)], **kw).train(str(tmp_path / "checkpoint-4"))
    again = read(tmp_path)
    assert [x["step"] for x in again] == [1, 2, 3, 4, 5, 6, 6]
    assert [x.get("loss") for x in again] == [x.get("loss") for x in whole]
    assert again[3]["time"] == whole[3]["time"]
    assert again[4]["time"] > whole[4]["time"]


def test_metrics_file_writes_valid_json_for_nan(tmp_path: Path):
    state = TrainerState(global_step=3, epoch=0.5, is_world_process_zero=True)
    logs = {"loss": float("nan"), "a": torch.tensor(2.0), "b": float("-inf"), "epoch": 0.5}
    MetricsFile(tmp_path).on_log(None, state, TrainerControl(), logs=logs)
    (found,) = read(tmp_path)
    assert found.pop("time") == pytest.approx(time.time(), abs=60)
    assert found == {
        **{"step": 3, "epoch": 0.5, "loss": None, "a": 2.0, "b": None},
        "nonfinite": {"loss": "nan", "b": "-inf"},
    }
    other = TrainerState(global_step=4, is_world_process_zero=False)
    MetricsFile(tmp_path).on_log(None, other, TrainerControl(), logs=logs)
    assert len(read(tmp_path)) == 1


def test_progress_is_one_line_per_log_where_there_is_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture):
    trainer(tmp_path, rows(8), [Progress()]).train()
    shown = [x for x in capsys.readouterr().out.splitlines() if x.startswith("step ")]
    assert len(shown) == 2
    assert shown[0].startswith("step 1/2  loss ")
    assert shown[1].endswith("left 0:00:00")


def test_the_line():
    logs = {"loss": 0.69314, "rewards/accuracies": 0.5, "rewards/margins": 0.01, "learning_rate": 5e-6}
    logs |= {"perf/tokens_per_s": 12345.6, "logps/chosen": -3.0}
    assert line(logs, 4, 200, 3725.0) == (
        "step 4/200  loss 0.6931  accuracy 0.500  margin 0.0100  lr 5e-06  tokens/s 12,346  left 1:02:05"
    )


# Trackers


class Slow(TrainerCallback):
    def on_log(self, args, state, control, **kw):
        time.sleep(30)


def test_a_slow_tracker_does_not_hold_up_the_run(tmp_path: Path, monkeypatch, capfd: pytest.CaptureFixture):
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "dvclive", Slow)
    start = time.monotonic()
    trainer(tmp_path, rows(32), [SafeTrackers(["dvclive"], tmp_path, patience=0.2)]).train()
    assert time.monotonic() - start < 20
    assert "tracker dvclive: not finished after 0.6 s; metrics.jsonl has every figure." in capfd.readouterr().err


def with_wandb(folder: Path) -> None:
    """Four runs with real wandb: told to be offline, no key, a malformed key, nobody at the address."""
    import wandb

    os.environ |= {"HOME": str(folder), "NETRC": str(folder / "none"), "WANDB_SILENT": "true"}
    base = {k: v for k, v in os.environ.items() if k == "WANDB_SILENT" or not k.startswith("WANDB")}
    silent = socket.create_server(("127.0.0.1", 0))
    address = f"http://127.0.0.1:{silent.getsockname()[1]}"
    cases = {
        "offline": {"WANDB_MODE": "offline"},
        "keyless": {},
        "malformed": {"WANDB_API_KEY": "short", "WANDB_BASE_URL": address},
        "unreachable": {"WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"},
    }
    for name, env in cases.items():
        os.environ.clear()
        os.environ.update(base | env)
        (folder / name).mkdir()
        trainer(folder / name, rows(32), [SafeTrackers(["wandb"], folder / name)]).train()
        wandb.teardown()
        sys.stderr.write(f"end of {name}\n")
        sys.stderr.flush()


def test_wandb_offline_keyless_misconfigured_and_unreachable(tmp_path: Path):
    """Every run gets through, says what is wrong and has its figures in offline files."""
    pytest.importorskip("wandb")
    job = Job(tmp_path / "log", with_wandb, tmp_path)
    assert job.wait() == [0], job.said
    names = ["offline", "keyless", "malformed", "unreachable"]
    said = dict(zip(names, re.split("end of .*\n", job.said)))
    assert "tracker" not in said["offline"]
    assert "tracker wandb: PermissionError: no API key for https://" in said["keyless"]
    assert "tracker wandb: AuthenticationError: WANDB_API_KEY invalid: API key must have 40+" in said["malformed"]
    assert "tracker wandb: ConnectionRefusedError: [Errno 111] Connection refused: writing" in said["unreachable"]
    for name in names:
        (file,) = (tmp_path / name).glob("wandb/offline-run-*/run-*.wandb")
        assert b"train/loss" in file.read_bytes(), name


def test_a_tracker_that_is_not_installed_is_named_and_off(tmp_path: Path, capfd: pytest.CaptureFixture):
    trainer(tmp_path, rows(8), [SafeTrackers(["comet_ml"], tmp_path)]).train()
    assert "tracker comet_ml is off: RuntimeError: CometCallback requires comet-ml" in capfd.readouterr().err


def test_an_unknown_tracker_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"train\.report_to: no tracker is called 'wandbb'\. Did you mean 'wandb'\?"):
        SafeTrackers("wandbb", tmp_path)
    assert SafeTrackers("none", tmp_path)._feeds == []
    assert SafeTrackers(None, tmp_path)._feeds == []
