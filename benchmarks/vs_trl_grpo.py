"""`po` against TRL's GRPOTrainer: the same prompts, model, reward, hyperparameters and steps, side by side.

    python benchmarks/vs_trl_grpo.py                        # needs `pip install -e .[trl]`; half an hour on 2 CPU cores
    python benchmarks/vs_trl_grpo.py --repeats 1 --seeds 2  # a quick look
    python benchmarks/vs_trl_grpo.py --out docs/evidence    # writes vs_trl_grpo.md there

GRPO without a KL term (beta 0, clip 0.2, advantages over std + 1e-4), one optimizer step for each sampled batch, 8
completions of each prompt at temperature 1, prompts around 200 tokens. The model has random weights, all of them are
trained in fp32. Many tokens end a completion, so that lengths differ. Reward: the share of a completion's tokens in
the lower half of the vocabulary, which is 0.5 at first and quickly learnt.

Speed: a 7 M-parameter llama with a vocabulary of 32000, up to 128 new tokens. Each side runs in processes of its own,
in turns, under the same thread settings. Timed from the end of one optimizer step to that of the next, the first step
left out: everything; and apart from each other sampling (generation, rewards, advantages, books) and the rest, which
is forward, backward and the optimizer. Without Triton, so on every CPU, TRL puts all positions through the LM head,
prompts and padding included; with it only completions. Third side, `trl-lean`: TRL told to do so here too, which is
nearer to what it does on a GPU.

Curves: a small llama with a vocabulary of 1024, up to 32 new tokens, many steps and seeds: mean reward along the run.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import vs_trl

PROMPTS, K = 2, 8  # of a step
vs_trl.SIZES[1024] = (64, 128, 2)
REWARD = """
def low(completion_ids, **columns):
    return [sum(token < {half} for token in ids) / len(ids) for ids in completion_ids]
"""


@dataclass(frozen=True)
class Setting:
    """What both sides are given. One token in `stop_every` ends a completion."""

    vocabulary: int
    tokens: int
    stop_every: int
    learning_rate: float
    steps: int

    def make(self, folder: Path) -> None:
        """What both sides read: the model with its stop tokens, prompts, the reward."""
        folder.mkdir(parents=True, exist_ok=True)
        vs_trl.make_world(folder, PROMPTS * self.steps, self.vocabulary)
        rows = [json.loads(line)["prompt"] for line in (folder / "k2.jsonl").read_text().splitlines()]
        (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in rows))
        (folder / "rewards.py").write_text(REWARD.format(half=self.vocabulary // 2))
        settings = folder / "model" / "generation_config.json"
        stops = [2, *range(3, self.vocabulary, self.stop_every)]
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"eos_token_id": stops}))
        (folder / "setting.json").write_text(json.dumps(asdict(self)))

    @staticmethod
    def read(folder: Path) -> Setting:
        return Setting(**json.loads((folder / "setting.json").read_text()))


def common(given: Setting) -> dict[str, Any]:
    return {
        "learning_rate": given.learning_rate,
        "max_steps": given.steps,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


class Clock:
    """Wall and CPU seconds of sampling, and when optimizer steps ended."""

    def __init__(self) -> None:
        self.sampled = [0.0, 0.0]
        self.ends: list[list[float]] = []

    def timed(self, sample: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = now()
            out = sample(*args, **kwargs)
            self.sampled = [s + b - a for s, a, b in zip(self.sampled, start, now())]
            return out

        return run

    def attach(self, trainer: Any) -> None:
        from transformers import TrainerCallback

        clock = self

        class Ends(TrainerCallback):  # type: ignore[misc]
            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                clock.ends.append([*now(), *clock.sampled])

        trainer.add_callback(Ends())

    def per_step(self) -> list[list[float]]:
        """For every step but the first: wall, CPU, wall and CPU of its sampling."""
        return [[b - a for a, b in zip(x, y)] for x, y in zip(self.ends, self.ends[1:])]


def now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def side_trl(folder: Path, given: Setting, seed: int, clock: Clock, lean: bool = False) -> Any:
    from datasets import load_dataset
    from trl import GRPOConfig, GRPOTrainer
    from trl.trainer import utils

    args = GRPOConfig(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        per_device_train_batch_size=PROMPTS * K,  # TRL counts completions
        num_generations=K,
        max_completion_length=given.tokens,
        beta=0.0,
        epsilon=0.2,
        loss_type="grpo",
        scale_rewards="group",
        shuffle_dataset=False,
        gradient_checkpointing=False,
        bf16=False,
        seed=seed,
        model_init_kwargs={"dtype": "float32"},
        **common(given),
    )
    spec = importlib.util.spec_from_file_location("rewards", folder / "rewards.py")
    assert spec is not None
    assert spec.loader is not None
    rewards = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rewards)
    rows = load_dataset("json", data_files=str(folder / "prompts.jsonl"), split="train", cache_dir=str(folder / "hf"))
    trainer = GRPOTrainer(str(folder / "model"), reward_funcs=rewards.low, args=args, train_dataset=rows)
    if lean:
        utils._use_triton = lambda device: True  # asked here only for which positions to score
    trainer._generate_and_score_completions = clock.timed(trainer._generate_and_score_completions)
    return trainer


def side_po(folder: Path, given: Setting, seed: int, clock: Clock) -> Any:
    from po.recipe import load
    from po.run import build

    recipe = folder / f"po-{seed}.yaml"
    recipe.write_text(
        json.dumps(
            {
                "model": {"name_or_path": str(folder / "model"), "dtype": "float32"},
                "data": {
                    "train": str(folder / "prompts.jsonl"),
                    "max_length": 2048,
                    "cache_dir": str(folder / "cache"),
                },
                "reference": "none",
                "rollout": {
                    "num_generations": K,
                    "max_completion_length": given.tokens,
                    "rewards": {"function": f"{folder / 'rewards.py'}:low"},
                },
                "loss": [{"head": "grpo", "eps": 1e-4}],
                "train": {
                    "per_device_train_batch_size": PROMPTS,
                    "train_sampling_strategy": "sequential",
                    **common(given),
                },
                "seed": seed,
                "output_dir": str(folder / f"po-{seed}-{os.getpid()}"),
            }
        )
    )
    trainer = build(*load(recipe, [])).trainer
    assert trainer.rollouts is not None
    trainer.rollouts.batches = clock.timed(trainer.rollouts.batches)  # type: ignore[method-assign]
    return trainer


def run_side(side: str, folder: Path, seeds: Sequence[int]) -> None:
    """In a process of its own: for every seed build, time every step, print one JSON line."""
    given = Setting.read(folder)
    for seed in seeds:
        clock = Clock()
        if side == "po":
            trainer = side_po(folder, given, seed, clock)
        else:
            trainer = side_trl(folder, given, seed, clock, lean=side == "trl-lean")
        clock.attach(trainer)
        trainer.train()
        lines = [entry for entry in trainer.state.log_history if "loss" in entry]
        found = {
            "steps": clock.per_step(),
            "reward": [line["reward"] for line in lines],
            "length": [line["completions/mean_length"] for line in lines],
            "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        }
        print("RESULT " + json.dumps(found), flush=True)


def measure(side: str, folder: Path, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """A run for every seed, in one process."""
    command = [sys.executable, __file__, "--side", side, "--folder", str(folder), "--these", *map(str, seeds)]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or len(lines) != len(seeds):
        sys.exit(f"{side} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return [json.loads(line[7:]) for line in lines]


SIDES = ("trl", "trl-lean", "po")
PARTS = ("whole step", "sampling", "training")


def parts(run: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Median wall and CPU seconds of a step's parts."""
    steps = run["steps"]
    pick = {
        "whole step": [(w, c) for w, c, _, _ in steps],
        "sampling": [(w, c) for _, _, w, c in steps],
        "training": [(w - sw, c - sc) for w, c, sw, sc in steps],
    }
    return {name: (median(w for w, _ in x), median(c for _, c in x)) for name, x in pick.items()}


def times(runs: dict[str, list[dict[str, Any]]]) -> list[str]:
    """A table of medians over turns, and how many times po's the other sides' are; of wall time also over the turns."""
    found = {side: [parts(run) for run in some] for side, some in runs.items()}
    lines = [
        "| of a step | | wall s | CPU s | wall / po's | least to most of the turns | CPU / po's |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in PARTS:
        mid = {side: [median(p[name][i] for p in some) for i in (0, 1)] for side, some in found.items()}
        for side, (wall, cpu) in mid.items():
            turns = [a[name][0] / b[name][0] for a, b in zip(found[side], found["po"])]
            ratios = f"{wall / mid['po'][0]:.2f}x | {min(turns):.2f} to {max(turns):.2f} | {cpu / mid['po'][1]:.2f}x"
            lines.append(f"| {name} | {side} | {wall:.2f} | {cpu:.2f} | {'| |' if side == 'po' else ratios} |")
    gib = {side: median(run["gib"] for run in some) for side, some in runs.items()}
    length = {side: mean(mean(run["length"]) for run in some) for side, some in runs.items()}
    memory = ", ".join(f"{side} {x:.2f} GiB" + f" ({x / gib['po']:.2f}x)" * (side != "po") for side, x in gib.items())
    tokens = ", ".join(f"{side} {x:.1f}" for side, x in length.items())
    return [*lines, "", f"Peak memory of the process: {memory}. Tokens of a completion, mean: {tokens}."]


def spread(values: Sequence[float]) -> float:
    """The standard error of a mean."""
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def curves(runs: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Mean rewards over seeds along the run, and how many standard errors the sides differ by."""
    lines = ["| step | TRL reward | po reward | difference / its standard error |", "|---|---|---|---|"]
    last = len(runs["po"][0]["reward"])
    gaps = []
    for step in range(last):
        a, b = ([run["reward"][step] for run in runs[side]] for side in ("trl", "po"))
        error = (spread(a) ** 2 + spread(b) ** 2) ** 0.5
        gaps.append((mean(a) - mean(b)) / error)
        if step % max(1, last // 6) == 0 or step == last - 1:
            lines.append(
                f"| {step + 1} | {mean(a):.4f} ± {spread(a):.4f} | {mean(b):.4f} ± {spread(b):.4f} | {gaps[-1]:+.1f} |"
            )
    a, b = ([mean(run["reward"]) for run in runs[side]] for side in ("trl", "po"))
    whole = (mean(a) - mean(b)) / (spread(a) ** 2 + spread(b) ** 2) ** 0.5
    beyond = sum(abs(g) > 2 for g in gaps)
    return [
        *lines,
        "",
        f"± is the standard error over {len(a)} seeds. Mean reward of a run: TRL {mean(a):.4f} ± {spread(a):.4f}, po "
        f"{mean(b):.4f} ± {spread(b):.4f}, {whole:+.1f} standard errors apart; {beyond} of {last} steps differ by more "
        "than 2.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="processes of each side, for speed")
    parser.add_argument("--seeds", type=int, default=5, help="of each side, for the curves")
    parser.add_argument("--steps", type=int, nargs=2, default=(4, 24), help="of the runs for speed, and of the curves'")
    parser.add_argument("--out", type=Path, help="a folder for vs_trl_grpo.md")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--these", type=int, nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        run_side(given.side, given.folder, given.these)
        return
    speed, learning = Setting(32000, 128, 128, 5e-4, given.steps[0]), Setting(1024, 32, 64, 2e-3, given.steps[1])
    report = []
    with tempfile.TemporaryDirectory() as name:
        if given.seeds > 1:
            learning.make(folder := Path(name) / "curves")
            report += curves({side: measure(side, folder, range(given.seeds)) for side in ("trl", "po")})
            print("\n".join(report), flush=True)
        if given.repeats:
            speed.make(folder := Path(name) / "speed")
            runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
            for turn in range(given.repeats):
                for side in SIDES if turn % 2 == 0 else SIDES[::-1]:
                    runs[side] += measure(side, folder, [turn])
            found = times(runs)
            print("\n".join(found), flush=True)
            report = [*found, "", *report]
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "vs_trl_grpo.md").write_text("\n".join(report) + "\n", "utf-8")


if __name__ == "__main__":
    main()
