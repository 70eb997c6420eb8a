"""Reward models on the sandbox with planted wrong labels: plain, smoothed, and mended by an out-of-fold ensemble.

    python -m po.sandbox build && python benchmarks/reward_models.py --out /tmp/rewards --seeds 0 1 2

1200 pairs of the sandbox's scored answers to 400 questions, the rewards at least 0.1 apart; the labels of a fifth are
turned over. Accuracy is over 1000 pairs of other questions with true labels. About six minutes a seed on one core.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from po.prep.inputs import open_inputs
from po.prep.relabel import ByStrength, strengths
from po.prep.step import run_step
from po.prep.strength import Bands, thresholds
from po.reward_model.recipe import load
from po.reward_model.run import train
from po.reward_model.strength import strength
from po.spec import Source

QUESTIONS, PAIRS, HELD, FLIPPED, GAP = 400, 1200, 1000, 0.2, 0.1
WAYS: dict[str, tuple[dict[str, Any], Bands | None, tuple[float, float, float] | None]] = {
    "true labels": ({}, None, None),
    "plain": ({}, None, None),
    "label smoothing 0.1": ({"label_smoothing": 0.1}, None, None),
    "flip below 0": ({}, Bands(), None),
    "flip the lowest 10 %": ({}, Bands(), (0.1, 0.1, 0.0)),
    "soft labels below 0": ({"soft_labels": True}, Bands(lowest="soft"), None),
    "drop the lowest 20 %": ({}, Bands(lowest="drop"), (0.2, 0.2, 0.0)),
}


def pairs(sets: list[dict[str, Any]], seed: int, limit: int, share: float) -> list[dict[str, Any]]:
    """Pairs of answers whose rewards differ by GAP, a share of them turned over (`planted`)."""
    rng, rows = random.Random(seed), []
    for row in sets:
        for (a, x), (b, y) in itertools.combinations(enumerate(row["responses"]), 2):
            if abs(x["reward"] - y["reward"]) >= GAP:
                planted = rng.random() < share
                better, worse = (x, y) if (x["reward"] > y["reward"]) != planted else (y, x)
                texts = {"chosen": better["content"], "rejected": worse["content"]}
                rows.append({"id": f"{row['id']}/{a}-{b}", "prompt": row["prompt"], **texts, "planted": planted})
    rng.shuffle(rows)
    return rows[:limit]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    return path


def recipe(folder: Path, sandbox: Path, rows: Path, name: str, seed: int, objective: dict[str, Any]) -> Any:
    """One run's recipe."""
    how = {"per_device_train_batch_size": 32, "learning_rate": 3e-4, "num_train_epochs": 2, "eval_strategy": "no"}
    tree = {
        "model": {"name_or_path": str(sandbox / "model"), "dtype": "float32"},
        "data": {"train": str(rows), "eval": str(folder / "held.jsonl"), "max_length": 128},
        "objective": objective,
        "ensemble": {"folds": 3, "members": 2},
        "train": how | {"save_strategy": "no", "disable_tqdm": True},
        "seed": seed,
        "output_dir": str(folder / name),
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree), "utf-8")
    return load(path)[0]


def mended(judged: Path, bands: Bands, shares: tuple[float, float, float] | None, out: Path) -> Path:
    """What `repair.py strength` makes of judged pairs."""
    source = Source(str(judged))
    if shares is not None:
        records = (r for one in open_inputs([source]) for r in one.records())
        low, middle, high = thresholds(strengths(records, ByStrength(source, bands)), *shares)
        bands = replace(bands, low=low, middle=middle, high=high)
    run_step("repair strength", [source], out, ByStrength(source, bands), options={"bands": repr(bands)}, force=True)
    return out


def one_seed(folder: Path, sandbox: Path, seed: int) -> dict[str, Any]:
    """Every way, on the same wrong labels."""
    folder.mkdir(parents=True, exist_ok=True)
    read = [json.loads(line) for line in (sandbox / "train.jsonl").read_text("utf-8").splitlines()]
    write(folder / "held.jsonl", pairs(read[QUESTIONS:], 0, HELD, 0.0))
    clean = write(folder / "clean.jsonl", pairs(read[:QUESTIONS], seed, PAIRS, 0.0))
    noisy = write(folder / "noisy.jsonl", pairs(read[:QUESTIONS], seed, PAIRS, FLIPPED))
    judged = folder / "judged.jsonl"
    if not judged.exists():
        strength(recipe(folder, sandbox, noisy, "ensemble", seed, {}), judged)
    rows = [json.loads(line) for line in judged.read_text("utf-8").splitlines()]
    against = [sum(r["margins"]) < 0 for r in rows]
    hits = sum(a and r["planted"] for a, r in zip(against, rows))
    found: dict[str, Any] = {"precision": hits / sum(against), "recall": hits / sum(r["planted"] for r in rows)}
    for way, (objective, bands, shares) in WAYS.items():
        name = way.replace(" ", "-").replace(",", "").replace("%", "percent")
        rows_of = clean if way == "true labels" else noisy
        if bands is not None:
            rows_of = mended(judged, bands, shares, folder / f"{name}.jsonl")
        one = recipe(folder, sandbox, rows_of, name, seed, objective)
        report = folder / name / "reward_report.json"
        if not report.exists():
            train(one)
        said = json.loads(report.read_text("utf-8"))["evaluation"]
        found[way] = {k: said[k] for k in ("accuracy", "ece", "loss", "buckets")}
        print(f"seed {seed}: {way}: accuracy {said['accuracy']:.3f}, ECE {said['ece']:.3f}", flush=True)
    return found


def main() -> None:
    """All seeds, a table and results.json."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--sandbox", type=Path, default=Path(".sandbox"))
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = p.parse_args()
    found = {seed: one_seed(args.out / f"seed-{seed}", args.sandbox, seed) for seed in args.seeds}
    (args.out / "results.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    names = ", ".join(map(str, args.seeds))
    print(f"| way | accuracy, seeds {names} | mean | ECE |\n|---|---|---|---|")
    for way in WAYS:
        each = [f[way]["accuracy"] for f in found.values()]
        ece = sum(f[way]["ece"] for f in found.values()) / len(found)
        print(f"| {way} | {', '.join(f'{x:.3f}' for x in each)} | {sum(each) / len(each):.3f} | {ece:.3f} |")
    for what in ("precision", "recall"):
        print(f"strength below 0 finds planted flips: {what} {', '.join(f'{f[what]:.3f}' for f in found.values())}")


if __name__ == "__main__":
    main()
