"""Training to the end, from the start or from the newest whole checkpoint; a stop on request is an error that says how
to go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from po.callbacks import GracefulStop
from po.checkpoint import check_same, newest_sound
from po.errors import StoppedError
from po.process import say


def run_to_end(trainer: Any, stop: GracefulStop, folder: Path, resume: bool) -> None:
    """trainer: with `meta`, what a resumed run must have in common with the run that it resumes.

    Raises UserError where they differ, StoppedError where the run was asked to stop and has saved.
    """
    checkpoint = newest_sound(folder) if resume else None
    if checkpoint is not None:
        check_same(checkpoint, trainer.meta)
        say(f"resuming from {checkpoint}")
    elif resume:
        say(f"{folder} holds no whole checkpoint: starting from the beginning")
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if stop.stopped:
        raise StoppedError(
            f"stopped on request and saved at step {trainer.state.global_step}; the same command with resume=true "
            "goes on from there"
        )
