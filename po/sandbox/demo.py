"""The main job on the sandbox, as a user would do it: build, train under the launcher, export, compare."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from po.errors import POError, UserError
from po.process import quiet
from po.sandbox.display import ProgressLine, show
from po.sandbox.evaluation import evaluate, load
from po.sandbox.store import Sandbox, Size, build, find

RECIPE, SCRIPT = Path("recipes/quickstart.yaml"), Path("launch/train.py")
RUN, SANDBOX = Path("runs/quickstart"), Path(".sandbox")


def say(text: str) -> None:
    """One line for people."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def make(out: Path, seed: int) -> Sandbox:
    """Build a sandbox, or find it, and say what it holds."""
    start, size = time.perf_counter(), Size()
    if find(out, seed, size) is None:
        say("      pretraining takes about 90 s on 2 cores, sampling about 15 s; both are kept for the next time")
    sandbox = build(out, seed, size, ProgressLine())
    facts = sandbox.manifest()
    say(
        f"      {out}: a llama of {facts['parameters'] / 1e6:.1f} M parameters, {size.train} questions with "
        f"{size.responses} answers, mean reward {facts['mean_reward']:.3f} ({time.perf_counter() - start:.0f} s)"
    )
    return sandbox


def demo() -> None:
    """All of it, from the root of a checkout. Raises POError where a stage fails, with its command and last lines."""
    for path in (RECIPE, SCRIPT):
        if not path.is_file():
            raise UserError(f"demo: expected {path} here, in {Path.cwd()}. Run it from the root of a checkout of po")
    start, run = time.perf_counter(), fresh(RUN)
    say("[1/4] a small world: corpus, tokenizer, base model, sampled and scored answers")
    make(SANDBOX, seed=0)
    say(f"[2/4] training a LoRA adapter on them with {RECIPE}: about a minute on 2 cores")
    train = [str(beside_python("deepspeed")), "--num_accelerators", "1", "--master_port", str(free_port()), str(SCRIPT)]
    command([*train, str(RECIPE), f"output_dir={run}"], environment())
    say("[3/4] exporting the adapter: a few seconds")
    command([sys.executable, "-m", "po.cli", "export", str(run), "--adapter"], environment())
    say("[4/4] answering held-out questions before and after: about 20 s")
    report(run, SANDBOX)
    seconds = time.perf_counter() - start
    say(f"\nall of it took {seconds:.0f} s; the run is in {run}, this comparison in {run}/report.json")


def report(run: Path, sandbox: Path) -> None:
    """Compare a run's exported adapter, loaded by plain PEFT, with its base; print it and write RUN/report.json."""
    quiet()
    prompts = sandbox / "held_out.jsonl"
    if not prompts.is_file():
        raise UserError(
            f"{sandbox}: expected a sandbox, found no {prompts.name}. Make it with: python -m po.sandbox build"
        )
    base, policy, tokenizer = load(sandbox / "model", run / "export-adapter")
    rows = [json.loads(line)["prompt"] for line in prompts.read_text("utf-8").splitlines()]
    found = evaluate(base, policy, tokenizer, rows, progress=ProgressLine())
    (run / "report.json").write_text(json.dumps(found.to_json(), indent=2) + "\n", "utf-8")
    show(found)


def fresh(run: Path) -> Path:
    """A run folder that is not there yet: runs/quickstart, runs/quickstart-2, ...; earlier runs stay as they are."""
    number, path = 1, run
    while path.exists():
        number += 1
        path = run.with_name(f"{run.name}-{number}")
    return path


def free_port() -> int:
    """A port that nobody listens on, for the launcher's rendezvous."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
    return port


def beside_python(name: str) -> Path:
    """A program of this Python's environment, whether that is activated or not."""
    path = Path(sys.executable).parent / name
    if not path.is_file():
        raise UserError(
            f"demo: expected {path}, found none. Install po's dependencies with this Python: pip install -e ."
        )
    return path


def environment() -> dict[str, str]:
    """The environment of the commands: this Python's programs first, the CPU where there is no GPU, few threads."""
    env = dict(os.environ)
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env.get('PATH', '')}"
    env["TOKENIZERS_PARALLELISM"] = "false"
    env.setdefault("OMP_NUM_THREADS", str(min(2, os.cpu_count() or 1)))
    if not torch.cuda.is_available():
        env["DS_ACCELERATOR"] = "cpu"
    return env


def command(words: Sequence[str], env: Mapping[str, str]) -> None:
    """Run a command and pass its output on. Raises POError with the command and its last lines where it fails."""
    text, last = shlex.join(words), deque[str](maxlen=25)
    say(f"      $ {text}")
    process = subprocess.Popen(
        words, env=dict(env), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    with process:
        for line in process.stdout or ():
            last.append(line)
            sys.stdout.write(f"      {line}")
            sys.stdout.flush()
    if process.returncode:
        raise POError(
            f"this command ended with exit code {process.returncode}:\n  {text}\nIts last lines:\n{''.join(last)}"
        )
