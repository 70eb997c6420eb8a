"""Experiment trackers (wandb, tensorboard ...) that cannot stop or slow a run.

Each tracker lives in a thread of its own and is fed through a queue. One that is missing, misconfigured, unreachable or
slow is named once on stderr, and the run goes on. wandb then writes offline files into the run folder.
"""

from __future__ import annotations

import copy
import netrc
import os
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal
from urllib.parse import urlparse
from urllib.request import getproxies

from transformers import TrainerCallback
from transformers.integrations import integration_utils

from po.errors import UserError, suggest

_Event = tuple[str, tuple[Any, ...], dict[str, Any]]


def _say(text: str) -> None:
    sys.stderr.write(f"tracker {text}\n")


class SafeTrackers(TrainerCallback):
    """The callbacks behind `report_to`, on rank 0 only; give TrainingArguments report_to="none" beside it.

    UserError for a name that transformers does not know.
    """

    def __init__(self, report_to: str | Sequence[str] | None, run_dir: Path, patience: float = 20.0) -> None:
        names = [report_to] if isinstance(report_to, str) else list(report_to or [])
        if names == ["all"]:
            names = integration_utils.get_available_reporting_integrations()
        names = [n for n in names if n != "none"]
        for name in names:
            if name not in integration_utils.INTEGRATION_TO_CALLBACK:
                known = sorted(integration_utils.INTEGRATION_TO_CALLBACK)
                raise UserError(
                    f"train.report_to: no tracker is called {name!r}.{suggest(name, known)} Known: {', '.join(known)}; "
                    "none switches tracking off."
                )
        self._feeds = [_Feed(name, run_dir, patience) for name in names]

    def _put(self, event: str, state: Any, args: Any, control: Any, kwargs: dict[str, Any]) -> None:
        if state.is_world_process_zero:
            then = copy.copy(state)  # the run moves on while the tracker works
            for feed in self._feeds:
                feed.put((event, (args, then, copy.copy(control)), kwargs))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._put("on_train_begin", state, args, control, kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self._put("on_log", state, args, control, {**kwargs, "logs": dict(logs or {})})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Gives every tracker its time limit to write what it still has."""
        self._put("on_train_end", state, args, control, kwargs)
        for feed in self._feeds:
            feed.drain()


class _Feed:
    """One tracker and its thread, which starts with the first event."""

    def __init__(self, name: str, run_dir: Path, patience: float) -> None:
        self._name, self._run_dir, self._patience = name, run_dir, patience
        self._queue: SimpleQueue[_Event | threading.Event] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._failed: set[str] = set()

    def put(self, event: _Event) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=f"tracker {self._name}", daemon=True)
            self._thread.start()
        self._queue.put(event)

    def drain(self) -> None:
        """Wait for what was put, up to the time limit."""
        if self._thread is None:
            return
        done = threading.Event()
        self._queue.put(done)
        if not done.wait(3 * self._patience):
            _say(f"{self._name}: not finished after {3 * self._patience:g} s; metrics.jsonl has every figure.")

    def _run(self) -> None:
        callback: Any = None
        try:
            if self._name == "wandb":
                _start_wandb(self._run_dir, self._patience)
            callback = integration_utils.INTEGRATION_TO_CALLBACK[self._name]()
        except Exception as e:  # noqa: BLE001 a tracker may raise anything, and none of it may stop the run
            _say(f"{self._name} is off: {_first_line(e)}. The run goes on; metrics.jsonl has every figure.")
        while True:
            event = self._queue.get()
            if isinstance(event, threading.Event):
                event.set()
            elif callback is not None:
                self._call(callback, event)

    def _call(self, callback: Any, event: _Event) -> None:
        name, args, kwargs = event
        try:
            getattr(callback, name)(*args, **kwargs)
        except Exception as e:  # noqa: BLE001 as above
            if name not in self._failed:
                _say(f"{self._name}: {name} failed: {_first_line(e)}. The run goes on; metrics.jsonl has every figure.")
            self._failed.add(name)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0].rstrip(".")


def _start_wandb(run_dir: Path, patience: float) -> None:
    """Begin the wandb run that WandbCallback then uses: online where that works, else offline. Asks no question."""
    import wandb

    os.environ.setdefault("WANDB_DIR", str(run_dir))
    if os.environ.get("WANDB_LOG_MODEL", "false") != "false":
        _say("wandb: WANDB_LOG_MODEL is not supported and switched off; upload the exported adapter instead.")
        os.environ["WANDB_LOG_MODEL"] = "false"
    settings: dict[str, Any] = {"init_timeout": patience, "login_timeout": patience}
    if "finish_timeout" in wandb.Settings.model_fields:
        settings["finish_timeout"] = 3 * patience  # an upload that hangs must not keep the process alive

    def begin(mode: Literal["offline"] | None) -> None:
        project = os.environ.get("WANDB_PROJECT", "huggingface")
        wandb.init(project=project, name=run_dir.name, mode=mode, settings=wandb.Settings(**settings))

    found = wandb.setup().settings
    offline = found.mode in ("offline", "dryrun", "disabled")
    try:
        if not offline:
            _check_road(found)
        begin(None)
    except (wandb.errors.Error, OSError) as e:
        _say(f"wandb: {_first_line(e)}: writing offline files to {run_dir}; `wandb sync` uploads them.")
        begin("offline")


def _check_road(settings: Any) -> None:
    """OSError, within seconds, where wandb would wait long or ask for a key: no key known, or nobody at the address."""
    if not _has_credentials(settings):
        raise PermissionError(f"no API key for {settings.base_url}")
    url = urlparse(str(settings.base_url))
    if not getproxies() and url.hostname:
        socket.create_connection((url.hostname, url.port or (443 if url.scheme == "https" else 80)), timeout=5).close()


def _has_credentials(settings: Any) -> bool:
    if settings.api_key or os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:
        known = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return False
    hosts = [urlparse(str(settings.base_url)).netloc, *([] if "WANDB_BASE_URL" in os.environ else ["api.wandb.ai"])]
    return any(known.authenticators(host) is not None for host in hosts)
