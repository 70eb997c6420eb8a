"""Happier stories: a real small language model trained on what it writes itself, with a reward that a reader can judge.

    python benchmarks/stories.py                        # about 5 minutes on a quiet core
    python benchmarks/stories.py --steps 10 --seeds 1   # a quick look

The model is `models/stories260k` under --shared (260 thousand parameters, TinyStories). It goes on from openings like
"Once upon a time, there was a boy named Tom. He"; the reward is 1/2 for each of two different words of joy in the first
64 tokens (happy, smiled, laughed, ...), less 1 for a word of sadness or fear, less up to 1 for repeating itself. CoPG
with two samples through `po train`'s own road; its beta prices every nat of distance from the model as it was, without
which the words of joy come at the cost of English. Printed: the reward, each of its parts and the KL, on openings that
were not trained on, with 95 % intervals over seeds, and the same stories before and after.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from harness.runs import environment
from harness.stats import interval

from po.forest import pad
from po.logprob import score
from po.metrics import Meter
from po.recipe import load
from po.rollout.stats import group_metrics
from po.run import build

ROOT = Path(__file__).parents[1]
GIRLS = ("Lily", "Sara", "Mia", "Amy", "Lucy", "Anna", "Ella", "Jane", "Sue", "Molly", "Emma", "Daisy")
BOYS = ("Tom", "Tim", "Ben", "Max", "Sam", "Jack", "Bob", "Leo", "Fred", "Mark", "Joe", "Dan")
JOY = (
    "happy happily joy fun smile smiled laugh laughed love loved hug hugged glad excited proud thank thanked nice kind"
)
GLOOM = "sad cry cried tears scared afraid hurt angry mad mean bad sorry lost broke broken worried scream screamed fell"
PLACES = ("", " in a park", " in a small house", " by the sea")


def joy(completions: Sequence[str], **columns: Any) -> list[float]:
    """1/2 for each of at most two different words of joy."""
    return [min(2, len(_words(text) & set(JOY.split()))) / 2 for text in completions]


def gloom(completions: Sequence[str], **columns: Any) -> list[float]:
    """1 where there is a word of sadness, fear or harm."""
    return [float(bool(_words(text) & set(GLOOM.split()))) for text in completions]


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


def openings(held_out: bool) -> list[str]:
    """Openings of stories; those held out have heroes of their own."""
    half = slice(8, 12) if held_out else slice(0, 8)
    heroes = [("girl", "She", n) for n in GIRLS[half]] + [("boy", "He", n) for n in BOYS[half]]
    starts = "<s>Once upon a time{place}, there was a {adj}{kind} named {name}. {they}"
    return [
        starts.format(place=place, adj=adj, kind=kind, name=name, they=they)
        for kind, they, name in heroes
        for place in PLACES
        for adj in ("", "little ")
    ]


def recipe(model: Path, out: Path, steps: int, seed: int, beta: float) -> Path:
    """The recipe of one run, and its prompts."""
    out.mkdir(parents=True, exist_ok=True)
    for split in ("train", "eval"):
        lines = [json.dumps({"prompt": text}) for text in openings(split == "eval")]
        (out / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    here = Path(__file__).resolve()
    said = {
        "model": {"name_or_path": str(model), "dtype": "float32"},
        "lora": {"r": 16, "alpha": 32},
        "data": {"train": str(out / "train.jsonl"), "eval": str(out / "eval.jsonl"), "max_length": 256},
        "rollout": {
            "num_generations": 2,
            "max_completion_length": 64,
            "rewards": [
                f"{here}:joy",
                {"function": f"{here}:gloom", "weight": -1.0},
                {"verifier": "repetition", "options": {"n": 3}},
            ],
        },
        "reference": {"from": "init", "kind": "adapter_off"},
        "loss": [{"head": "copg", "beta": beta}],
        "train": {
            "max_steps": steps,
            "learning_rate": 1e-3,
            "per_device_train_batch_size": 16,
            "logging_steps": 10,
            "save_strategy": "no",
            "eval_strategy": "no",
            "disable_tqdm": True,
        },
        "seed": seed,
        "output_dir": str(out / "run"),
    }
    path = out / "recipe.yaml"
    path.write_text(yaml.safe_dump(said))
    return path


def look(trainer: Any) -> tuple[dict[str, float], list[str]]:
    """What four samples of each held-out opening earn, their KL to the model as it was (nats per story, by these very
    samples), and the first few stories; the same random numbers whenever it is asked."""
    prompts = trainer.eval_dataset.examples
    groups = trainer.rollouts.samples(trainer.model, prompts, 4)
    meter = Meter()
    for name, values, mask in group_metrics(groups, trainer.rollouts.spec):
        meter.add(name, values, mask)
    stream = pad([(prompts[w.example].prompt_ids, [a.ids for a in w.answers]) for w in groups], 4)
    with torch.no_grad():
        model = trainer.model.eval()
        logp_T = score(model, stream).logp_T
        with model.disable_adapter():
            gap = float((logp_T - score(model, stream).logp_T).sum())
        model.train()
    kl = {"KL": gap / (4 * len(groups))}
    few = [[*prompts[w.example].prompt_ids, *w.answers[0].ids] for w in groups[:: len(groups) // 4][:4]]
    texts = [trainer.processing_class.decode(ids, skip_special_tokens=True) for ids in few]
    return meter.flush() | kl, texts


COLUMNS = (
    "reward",
    "rewards/joy/mean",
    "rewards/gloom/mean",
    "rewards/repetition/mean",
    "KL",
    "completions/mean_length",
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="default: %(default)s")
    parser.add_argument("--beta", type=float, default=0.03, help="reward per nat; default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "stories", help="default: runs/stories")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared", help="default: beside the checkout")
    args = parser.parse_args(argv)
    model = args.shared / "models" / "stories260k"
    if not model.is_dir():
        print(f"left out: there is no {model}; --shared names the folder that has it")
        return 0
    environment(args.out / "cache")
    start, before, after, texts = time.process_time(), [], [], []
    for seed in range(args.seeds):
        out = args.out / str(seed)
        shutil.rmtree(out, ignore_errors=True)
        job = build(load(recipe(model, out, args.steps, seed, args.beta))[0])
        first, said = look(job.trainer)
        job.trainer.train()
        last, says = look(job.trainer)
        before.append(first)
        after.append(last)
        texts = texts or list(zip(said, says, strict=True))
        job.lock.release()
    text = report(before, after, texts)
    text += f"\n`python benchmarks/stories.py --steps {args.steps} --seeds {args.seeds}`: "
    text += f"{time.process_time() - start:.0f} s of one core.\n"
    (args.out / "stories.md").write_text(text, "utf-8")
    print("\n" + text)
    return 0


def report(
    before: Sequence[Mapping[str, float]], after: Sequence[Mapping[str, float]], texts: Sequence[tuple[str, str]]
) -> str:
    """A table and pairs of stories."""
    lines = ["| held-out openings | before | after |", "|---|---|---|"]
    for name in COLUMNS:
        cells = [interval([run[name] for run in runs]).text(2) for runs in (before, after)]
        lines.append(f"| {name} | {cells[0]} | {cells[1]} |")
    for was, now in texts:
        lines += ["", f"- before: {' '.join(was.split())}", f"- after: {' '.join(now.split())}"]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
