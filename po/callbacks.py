"""What watches over a run: a stop on request, a stop when nothing moves, a stop before NaN reaches the weights."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import TrainerCallback

from po.errors import NumericsError
from po.ranks import gather, on_any, rank
from po.types import HeadInput


class GracefulStop(TrainerCallback):
    """SIGTERM, SIGUSR1 or Ctrl-C on any rank, or a launcher that has vanished: all ranks save at the end of the step
    and leave `train`. `stopped` tells the caller why the run is short; it ends with po.errors.Stopped. A second Ctrl-C,
    two seconds or more after the first, ends the process at once."""

    def __init__(self) -> None:
        self.stopped = False
        self._asked: str | None = None
        self._asked_at = 0.0
        self._before: dict[int, Any] = {}
        self._ancestors: tuple[int, ...] = ()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._ancestors = _launchers()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                self._before[number] = signal.signal(number, self._ask)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._asked is not None and time.monotonic() - self._asked_at > 2:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if self._asked is None:
            self._asked, self._asked_at = signal.Signals(number).name, time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._asked is None and self._ancestors != _launchers():
            self._asked = "the launcher has vanished"
        if not on_any(torch.tensor(self._asked is not None, device=args.device)):
            return
        control.should_save = control.should_training_stop = True
        if self._asked is not None and not self.stopped:
            why = f"rank {rank()}: {self._asked}: saving at step {state.global_step} and leaving\n"
            sys.stderr.write(why)
        self.stopped = True


def _launchers() -> tuple[int, ...]:
    """The processes that started this rank and look after it: torchrun, or deepspeed's launch and what started that.
    Empty for a process that was started by hand, whose shell may go (nohup)."""
    if "LOCAL_RANK" not in os.environ:
        return ()
    parent = os.getppid()
    try:
        command = Path(f"/proc/{parent}/cmdline").read_bytes()
        stat = Path(f"/proc/{parent}/stat").read_text()
    except OSError:
        return (parent,)
    above = int(stat.rpartition(")")[2].split()[1])
    return (parent, above) if b"deepspeed.launcher.launch" in command else (parent,)


class Watchdog(TrainerCallback):
    """Ends the process, with the stacks of all threads on stderr, when nothing moves for `seconds`: no step, evaluation
    batch, call of a sampler, log line or save. Works while the main thread is blocked in a collective; the launcher
    then ends the others. 0 switches it off; None reads PO_WATCHDOG_SECONDS, else half an hour."""

    def __init__(self, seconds: float | None = None) -> None:
        self._seconds = float(os.environ.get("PO_WATCHDOG_SECONDS", 1800)) if seconds is None else seconds
        self._step = 0
        self._deadline: float | None = None
        self._done = threading.Event()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._seconds > 0:
            self._done.clear()
            self._beat(args, state, control)
            threading.Thread(target=self._wait, name="watchdog", daemon=True).start()

    def _beat(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._seconds > 0:
            self._step, self._deadline = state.global_step, time.monotonic() + self._seconds
            # for a main thread that holds the interpreter: C code that never returns
            faulthandler.dump_traceback_later(self._seconds + 30, exit=True, file=_stderr())

    on_step_begin = on_substep_end = on_step_end = on_log = on_save = _beat
    on_evaluate = on_prediction_step = on_epoch_begin = on_epoch_end = _beat

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._done.set()
        faulthandler.cancel_dump_traceback_later()

    def _wait(self) -> None:
        assert self._deadline is not None
        while not self._done.wait(max(self._deadline - time.monotonic(), 0.01)):
            if time.monotonic() >= self._deadline:
                err = _stderr()
                err.write(
                    f"watchdog: rank {rank()}: nothing has moved for {self._seconds:g} s after step {self._step}. The "
                    "stacks of all threads follow; a rank that waits in a collective waits for another one.\n"
                )
                err.flush()
                faulthandler.dump_traceback(err)
                os._exit(1)


def _stderr() -> TextIO:
    assert sys.__stderr__ is not None  # the real one: stacks are written past Python
    return sys.__stderr__


@dataclass(frozen=True)
class _Micro:
    """One micro-batch under watch: its rows, what its heads saw, and whether loss and gradients stayed finite."""

    ids: Sequence[str]
    x: HeadInput
    sums: Tensor  # (2,) of loss and gradients, times 0: NaN where one was not finite


class NonFinite(TrainerCallback):
    """Stops all ranks before the weights change when the loss or a gradient of any trained weight is NaN or Inf.

    Every micro-batch's gradients are looked at as they arise, on the device; the ranks compare notes once per step,
    when the optimizer that owns the weights (inside DeepSpeed's, where there is one) is about to step. Under fp16's
    dynamic loss scale an overflowing gradient is the scaler's affair and only the loss stops the run.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._step = 0
        self._micros: list[_Micro] = []
        self._handles: list[Any] = []

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        while hasattr(optimizer, "optimizer"):  # accelerate's wrapper, DeepSpeed's wrapper
            optimizer = optimizer.optimizer
        self._handles = [p.register_hook(self._see) for p in model.parameters() if p.requires_grad]
        self._handles.append(optimizer.register_step_pre_hook(lambda *_: self._check(loss_only=False)))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step, self._micros = state.global_step + 1, []

    def watch(self, ids: Sequence[str], x: HeadInput, loss: Tensor) -> None:
        """One micro-batch, before its backward pass: the row of each group, what the heads see, the scalar loss."""
        x = replace(x, policy_T=x.policy_T.detach(), gates={})  # without the graph
        sums = torch.stack([loss.detach().float() * 0, loss.new_zeros((), dtype=torch.float32)])
        self._micros.append(_Micro(ids, x, sums))

    def _see(self, grad: Tensor) -> None:
        if self._micros:
            self._micros[-1].sums[1] += grad.detach().sum(dtype=torch.float32) * 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Catches a step that DeepSpeed skipped for an overflow, where the optimizer was never asked."""
        self._check(loss_only=bool(args.fp16))

    def _check(self, loss_only: bool) -> None:
        micros, self._micros = self._micros, []  # once a step: ZeRO-3 steps once per group of weights
        if not micros:
            return
        sums = torch.stack([m.sums for m in micros])
        if loss_only:
            sums = sums[:, :1]
        if on_any(~sums.isfinite().all()):
            raise NumericsError(self._report(micros, sums.isfinite().logical_not().tolist()))

    def _report(self, micros: Sequence[_Micro], bad: Sequence[Sequence[bool]]) -> str:
        """What happened where, the same text on all ranks; rank 0 writes the heads' inputs to the run folder."""
        mine = [_describe(rank(), n, m, b) for n, (m, b) in enumerate(zip(micros, bad)) if any(b)]
        found = [f for told in gather(mine) for f in told]
        stem = self._run_dir / f"nonfinite-step-{self._step}"
        kept = f"What the heads saw is in {stem}.safetensors, explained in {stem.name}.json."
        if rank() == 0:
            try:
                _dump(stem, found)
            except (OSError, SafetensorError) as e:
                kept = f"What the heads saw could not be written to {stem}.safetensors: {e}."
        said = "\n".join(
            f"  rank {f['rank']}, micro-batch {f['micro']}: {' and '.join(f['what'])} not finite; "
            f"rows {', '.join(f['rows'])}"
            for f in found
        )
        return (
            f"step {self._step}: NaN or Inf, so the step was not taken and the weights are as after step "
            f"{self._step - 1}.\n{said}\n{kept}\nLook at these rows first; then try a lower learning rate or "
            "max_grad_norm, or bfloat16 in place of float16, and resume from the last checkpoint."
        )


def _describe(rank: int, n: int, micro: _Micro, bad: Sequence[bool]) -> dict[str, Any]:
    x = micro.x
    K = x.seg.valid_GK.shape[-1]
    fields = {"policy_T": x.policy_T, "ref_T": x.ref, "old_T": x.old, "reward_GK": x.reward, "label_GK": x.label}
    tensors = {k: v.detach().cpu().contiguous() for k, v in fields.items() if v is not None}
    slot_T, valid_GK = x.seg.slot_T.cpu(), x.seg.valid_GK.cpu()
    counted = valid_GK.any(-1).tolist()
    guilty: set[int] = set()
    for name, value in tensors.items():
        odd = ~value.isfinite()
        at = slot_T[odd] // K if name.endswith("_T") else (odd & valid_GK).any(-1).nonzero().flatten()
        guilty.update(g for g in at.tolist() if counted[g])
    rows = sorted(guilty) or [g for g, c in enumerate(counted) if c]
    what = [name for name, b in zip(("loss", "gradient"), bad) if b]
    tensors |= {"slot_T": slot_T, "valid_GK": valid_GK}
    ids = list(micro.ids)
    return {"rank": rank, "micro": n, "what": what, "rows": [ids[g] for g in rows], "ids": ids, "tensors": tensors}


def _dump(stem: Path, found: Sequence[dict[str, Any]]) -> None:
    tensors = {f"rank{f['rank']}.micro{f['micro']}.{k}": v for f in found for k, v in f["tensors"].items()}
    save_file(tensors, f"{stem}.safetensors")
    facts = [{k: v for k, v in f.items() if k != "tensors"} for f in found]
    stem.with_name(f"{stem.name}.json").write_text(json.dumps(facts, indent=1))
