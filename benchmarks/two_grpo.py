"""2-GRPO against GRPO with 16 samples, on sums with a verifier: equal rollouts, equal updates, and the paper's way.

    python benchmarks/two_grpo.py                       # about 5 minutes of one core; needs `pip install -e .[bench]`
    python benchmarks/two_grpo.py --quick               # all of it once with next to no training
    python benchmarks/two_grpo.py --rates               # 16-GRPO at several learning rates, to choose one

Wu et al. 2025 (arXiv:2510.00977): GRPO with two samples of each prompt is on par with 16 samples, with an
eighth of the rollouts. All runs are recipes on po's own road (po.recipe.load, po.run.build, trainer), all weights
trained. The task: harness/sums.py.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from harness.stats import Interval, interval
from harness.sums import LONGEST, Schooling, Task, open_task

from po.recipe import load
from po.run import build

ROOT = Path(__file__).parents[1]
UPDATES, RATE = 160, 2e-4  # of 16-GRPO
WARMUP = 10  # updates, the paper's
CLIP = {"epsilon_low": 0.2, "epsilon_high": 0.28}
SIXTEEN = {"head": "grpo", "scale": "population", **CLIP}
TWO = {"head": "grpo2", **CLIP}


@dataclass(frozen=True)
class Arm:
    """A way to spend rollouts. share: of UPDATES; scale: of RATE."""

    name: str
    term: Mapping[str, Any]
    prompts: int  # in an update
    samples: int  # of each prompt
    share: float = 1.0
    scale: float = 1.0


ARMS = (
    Arm("16-GRPO", SIXTEEN, 16, 16),
    Arm("2-GRPO, equal rollouts", TWO, 128, 2),
    Arm("2-GRPO, equal updates", TWO, 16, 2),
    Arm("2-GRPO, the paper's: an eighth of the updates, rate x 8", TWO, 128, 2, 1 / 8, 8),
    Arm("the same, rate x sqrt(8)", TWO, 128, 2, 1 / 8, math.sqrt(8)),
    Arm("the same, rate x 1", TWO, 128, 2, 1 / 8),
)


@dataclass
class Result:
    """What one run came to. curve: pass rate after so many rollouts."""

    rollouts: int
    updates: int
    wall: float = 0.0  # seconds of training, without evaluation
    cpu: float = 0.0
    greedy: float = 0.0
    equal: float = 0.0  # share of groups whose rewards are all equal
    curve: dict[int, float] = field(default_factory=dict)

    @property
    def last(self) -> float:
        return self.curve[self.rollouts]


def recipe(task: Task, arm: Arm, updates: int, rate: float, seed: int, folder: Path) -> dict[str, Any]:
    """As YAML would say it."""
    return {
        "model": {"name_or_path": str(task.model)},
        "reference": "none",
        "data": {"train": str(task.rows), "max_length": 16},
        "rollout": {
            "num_generations": arm.samples,
            "max_completion_length": LONGEST,
            "rewards": {"verifier": "exact"},
        },
        "loss": [dict(arm.term)],
        "train": {
            "learning_rate": rate * arm.scale,
            "lr_scheduler_type": "constant_with_warmup",
            "warmup_steps": WARMUP,
            "per_device_train_batch_size": arm.prompts,
            "max_steps": updates,
            "logging_steps": updates,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        },
        "seed": seed,
        "output_dir": str(folder / "run"),
    }


def run(task: Task, arm: Arm, updates: int, rate: float, seed: int, looks: int = 8) -> Result:
    """Train an arm, and look at its pass rate at the start and so many times."""
    own = max(1, round(updates * arm.share))
    result = Result(own * arm.prompts * arm.samples, own)
    folder = Path(tempfile.mkdtemp(prefix="po-two-grpo-"))
    try:
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe(task, arm, own, rate, seed, folder)), "utf-8")
        with _told_to(folder / "output.txt"):
            job = build(load(folder / "recipe.yaml")[0])
            look = Look(task, result, max(1, own // looks), arm.prompts * arm.samples)
            job.trainer.add_callback(look)
            wall, cpu = time.perf_counter(), time.process_time()
            job.trainer.train()
            result.wall += time.perf_counter() - wall
            result.cpu += time.process_time() - cpu
        result.equal = next(line for line in job.trainer.state.log_history if "loss" in line)["frac_reward_zero_std"]
        result.greedy = task.passes(job.trainer.model)["greedy"]
        return result
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _told_to(path: Path) -> Iterator[None]:
    """What a run says goes to a file."""
    with open(path, "w", encoding="utf-8") as file, contextlib.redirect_stderr(file), contextlib.redirect_stdout(file):
        yield


class Look(transformers.TrainerCallback):
    """Notes the pass rate, and takes the time that this costs off the run's."""

    def __init__(self, task: Task, result: Result, every: int, rollouts: int) -> None:
        self._task, self._result, self._every, self._rollouts = task, result, every, rollouts

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_step_end(args, state, control, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self._every and state.global_step != self._result.updates:
            return
        wall, cpu = time.perf_counter(), time.process_time()
        training = model.training
        self._result.curve[state.global_step * self._rollouts] = self._task.passes(model.eval())["pass"]
        model.train(training)
        self._result.wall -= time.perf_counter() - wall
        self._result.cpu -= time.process_time() - cpu


SETTING = """A llama of {parameters} parameters, taught {shown} sums of two-digit numbers ({wrong:.0%} of the answers
with a wrong digit), answers {base:.3f} of {held_out} other sums rightly (greedily {greedy:.3f}); it is trained on
{train} further ones. Pass rate: mean probability of the right answer at temperature 1, computed, not sampled; ± is the
95 % t interval over {seeds} seeds of order and samples, from one base. Reward: the verifier `exact`. All weights,
AdamW, constant learning rate after {warmup} updates of warm-up, clip 0.2 / 0.28, one update per sampling, no KL.
Seconds are of training, without evaluation; CPU seconds are the trainer's process, without the verifier's."""


def markdown(task: Task, how: Schooling, found: Mapping[str, Sequence[Result]], rate: float) -> str:
    """The setting, the table and what it says of the claim."""
    base = task.base()
    passed = task.passes(base)
    seeds = len(next(iter(found.values())))
    facts = {"parameters": f"{base.num_parameters():,}", "base": passed["pass"], "greedy": passed["greedy"]}
    facts |= {
        "shown": how.shown,
        "wrong": how.wrong,
        "train": how.train,
        "held_out": how.held_out,
        "seeds": seeds,
        "warmup": WARMUP,
    }
    head = ("arm", "prompts x samples", "updates", "rollouts", "learning rate", "pass rate", "greedy")
    head += ("groups of equal reward", "wall s", "CPU s")
    lines = [SETTING.format(**facts), "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    lines += [_row(arm, found[arm.name], rate) for arm in ARMS if arm.name in found]
    return "\n".join([*lines, "", *_claims(found)]) + "\n"


def _row(arm: Arm, results: Sequence[Result], rate: float) -> str:
    one = results[0]
    cells = [
        arm.name,
        f"{arm.prompts} x {arm.samples}",
        str(one.updates),
        f"{one.rollouts:,}",
        f"{rate * arm.scale:.2g}",
    ]
    cells += [interval([r.last for r in results]).text(), interval([r.greedy for r in results]).text()]
    cells += [f"{_mean(r.equal for r in results):.0%}"]
    cells += [f"{_mean(r.wall for r in results):.0f}", f"{_mean(r.cpu for r in results):.0f}"]
    return f"| {' | '.join(cells)} |"


def _mean(values: Any) -> float:
    given = list(values)
    return sum(given) / len(given)


def _claims(found: Mapping[str, Sequence[Result]]) -> list[str]:
    """On par: at least 95 % of 16-GRPO's pass rate, seed by seed (the paper's own figure is 97.6 %)."""
    sixteen = found[ARMS[0].name]
    out = []
    for arm in ARMS[1:]:
        two = found[arm.name]
        share = two[0].rollouts / sixteen[0].rollouts
        ratio = interval([t.last / s.last for t, s in zip(two, sixteen, strict=True)])
        out.append(
            f"- {arm.name}: {ratio.text()} of 16-GRPO's pass rate, with {share:.3g} of its rollouts: "
            f"**{on_par(ratio)}**"
        )
    return out


def on_par(ratio: Interval) -> str:
    """By the whole interval."""
    if math.isnan(ratio.half):
        return "one seed says nothing"
    if ratio.low >= 0.95:
        return "on par"
    return "not on par" if ratio.high < 0.95 else "undecided: the interval holds 0.95"


def rates(task: Task, updates: int) -> None:
    """16-GRPO at several learning rates, on a seed that the comparison does not use."""
    for rate in (1e-4, 2e-4, 3e-4):
        done = run(task, ARMS[0], updates, rate, seed=100)
        print(f"16-GRPO, {rate:g}: {' '.join(f'{p:.3f}' for p in done.curve.values())}, {done.cpu:.0f} s", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--updates", type=int, default=UPDATES, help="of 16-GRPO (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=RATE, help="learning rate of 16-GRPO (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "two_grpo", help="default: runs/two_grpo")
    parser.add_argument("--work", type=Path, default=None, help="where the base is kept; default: the folder of --out")
    parser.add_argument("--quick", action="store_true", help="a smoke test: 8 updates, one seed, an untaught base")
    parser.add_argument("--rates", action="store_true", help="only 16-GRPO at several learning rates")
    args = parser.parse_args(argv)
    how = Schooling()
    if args.quick:
        args.seeds, args.updates = 1, 8
        how = replace(how, hidden_size=16, layers=1, steps=5, shown=100, train=300, held_out=50)
    args.out.mkdir(parents=True, exist_ok=True)
    work = args.work or args.out
    settle(work / "cache")
    task = open_task(work / "sums", how)
    if args.rates:
        rates(task, args.updates)
        return 0
    found: dict[str, list[Result]] = {arm.name: [] for arm in ARMS}
    for seed in range(args.seeds):
        for arm in ARMS:
            done = run(task, arm, args.updates, args.rate, seed)
            found[arm.name].append(done)
            print(f"seed {seed}, {arm.name}: {done.last:.3f}, {done.cpu:.0f} s of CPU", flush=True)
    text = markdown(task, how, found, args.rate)
    (args.out / "two_grpo.md").write_text(text, "utf-8")
    print("\n" + text)
    plot({name: [r.curve for r in results] for name, results in found.items()}, args.out / "two_grpo.png")
    return 0


def settle(cache: Path) -> None:
    """One thread, no GPU, prepared rows in a folder of the benchmark's own, no warnings."""
    os.environ |= {"PO_CACHE": str(cache.resolve()), "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"}
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()


def plot(curves: Mapping[str, Sequence[Mapping[int, float]]], path: Path) -> None:
    try:
        from harness.plot_curves import draw
    except ImportError:
        print("no plot: it needs matplotlib (pip install -e .[bench])")
        return
    draw(curves, path, "rollouts", "pass rate at temperature 1")


if __name__ == "__main__":
    sys.exit(main())
