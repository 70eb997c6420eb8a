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

Curves: a small llama with a vocabulary of 64, up to 16 new tokens, 24 steps and many seeds: mean reward along the run,
which must rise. And TRL's trainer on the samples of a run of po's, which must train the same weights.
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
from typing import Any

import vs_trl
from harness.grpo_report import SIDES, agreement, curves, times

PROMPTS, K = 2, 8  # of a step
vs_trl.SIZES[64] = (64, 128, 2)
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


def same(folder: Path) -> None:
    """`po`'s run, and TRL's trainer on the samples of that very run instead of its own: the largest differences."""
    given, clock = Setting.read(folder), Clock()
    po = side_po(folder, given, 0, clock)
    po.train()
    sampled: dict[int, list[Any]] = {}
    for line in next(folder.glob("po-0-*/rollouts/rank0.jsonl")).read_text().splitlines():
        row = json.loads(line)
        sampled.setdefault(row["round"], []).append(row)
    rounds = iter([sorted(rows, key=lambda row: int(row["place"])) for _, rows in sorted(sampled.items())])

    def given_samples(prompts: list[list[int]], *args: Any, **kwargs: Any) -> tuple[list[list[int]], None]:
        rows = next(rounds)
        assert prompts == [row["prompt_ids"] for row in rows for _ in row["responses"]]
        return [answer["token_ids"] for row in rows for answer in row["responses"]], None

    trl = side_trl(folder, given, 0, clock)
    trl._generate_single_turn = given_samples
    trl.train()
    logs = [[entry for entry in t.state.log_history if "loss" in entry] for t in (trl, po)]
    assert len(logs[0]) == len(logs[1]) == given.steps
    names = ("reward", "grad_norm", "entropy")
    print("RESULT " + json.dumps({n: max(abs(a[n] - b[n]) for a, b in zip(*logs)) for n in names}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="processes of each side, for speed")
    parser.add_argument("--seeds", type=int, default=24, help="of each side, for the curves")
    parser.add_argument("--first-seed", type=int, default=0, help="the first of the curves' seeds")
    parser.add_argument("--steps", type=int, nargs=2, default=(4, 24), help="of the runs for speed, and of the curves'")
    parser.add_argument("--out", type=Path, help="a folder for vs_trl_grpo.md")
    parser.add_argument("--side", choices=[*SIDES, "same"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--these", type=int, nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        same(given.folder) if given.side == "same" else run_side(given.side, given.folder, given.these)
        return
    speed, learning = Setting(32000, 128, 128, 5e-4, given.steps[0]), Setting(64, 16, 32, 5e-3, given.steps[1])
    report = []
    with tempfile.TemporaryDirectory() as name:
        if given.seeds > 1:
            learning.make(folder := Path(name) / "curves")
            report += [*agreement(*measure("same", folder, [0])), ""]
            seeds = range(given.first_seed, given.first_seed + given.seeds)
            report += curves({side: measure(side, folder, seeds) for side in ("trl", "po")})
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
