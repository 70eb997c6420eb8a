"""Every head on the sandbox: the frontier of true reward against KL to the reference, as a table and a plot.

    python benchmarks/objectives.py                      # all heads, 3 betas, 3 seeds; goes on where it stopped
    python benchmarks/objectives.py --heads dpo,nca --betas 0.1 --seeds 1 # a quick look
    python benchmarks/objectives.py --draw               # table and plot from the runs that are there

Needs `pip install -e .[bench]` for the plot. Each run is po's own road: a recipe, po.run.build, POTrainer, LoRA on the
sandbox's base model, 8 questions a step, with rows that are made from its scored answers (harness/derive.py says how).
Then the policy answers held-out questions: the true reward of its answers, and log pi / ref of them, whose mean is the
KL. beta is DPO's; other heads have their own strength in its place, times a factor (harness/plan.py); heads without one
learn faster or slower instead. Every finished run is a line of OUT/runs.jsonl; a run is known by everything that
decides it, its head's code included. OUT also gets frontier.md and frontier.png.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from harness.derive import derive
from harness.plan import Spec, specs, unfed
from harness.runs import Training, environment, fit, measure
from harness.table import frontier, markdown
from harness.world import World, open_world

from po.errors import POError
from po.heads import HEADS

ROOT = Path(__file__).parents[1]


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    environment(args.out / "cache")
    world = open_world(args.sandbox)
    heads = [h for h in args.heads if unfed(h) is None]
    left_out = {h: reason for h in args.heads if (reason := unfed(h)) is not None}
    for head, reason in left_out.items():
        print(f"left out: {head}: {reason}")
    plan = specs(heads, args.betas, range(args.seeds), args.steps, args.learning_rate)
    runs = args.out / "runs.jsonl"
    if not args.draw:
        _carry_out(plan, runs, world, args)
    _draw(plan, runs, world, args.out, left_out)
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    def listed(text: str) -> list[float]:
        return [float(x) for x in text.split(",")]

    def named(text: str) -> list[str]:
        names = text.split(",")
        if wrong := [n for n in names if n not in HEADS]:
            raise argparse.ArgumentTypeError(f"no head {wrong[0]!r}; `po heads` lists them")
        return names

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=named, default=list(HEADS), help="a,b,c (default: all that the rows can feed)")
    parser.add_argument("--betas", type=listed, default=[0.05, 0.2, 0.8], help="strengths (default: 0.05,0.2,0.8)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="default: %(default)s")
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "objectives", help="default: runs/objectives")
    parser.add_argument("--sandbox", type=Path, default=ROOT / ".sandbox", help="default: .sandbox")
    parser.add_argument("--draw", action="store_true", help="run nothing: table and plot of what is there")
    return parser.parse_args(argv)


def _carry_out(plan: Sequence[Spec], runs: Path, world: World, args: argparse.Namespace) -> None:
    done = {r["key"] for r in read(runs) if "error" not in r}
    todo = [s for s in plan if s.key(world.key) not in done]
    print(f"{len(plan)} runs, {len(plan) - len(todo)} of them done before; in {runs}", flush=True)
    start = time.perf_counter()
    if runs.is_file() and not runs.read_bytes().endswith(b"\n"):  # the last line was cut off
        with open(runs, "a", encoding="utf-8") as file:
            file.write("\n")
    for n, found in enumerate(_results(todo, world, args), 1):
        with open(runs, "a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
        left = (time.perf_counter() - start) / n * (len(todo) - n)
        said = found.get("error") or f"reward {found['reward']:.3f}  KL {found['kl']:.2f}  {found['seconds']:.0f} s"
        print(
            f"{n}/{len(todo)} {found['head']} {found['beta']:g} #{found['seed']}: {said}; {left:.0f} s left", flush=True
        )


def _results(todo: Sequence[Spec], world: World, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    tasks = [(s, args.sandbox, args.out) for s in todo]
    _prepare({s.kind for s in todo}, world, args.out)  # before processes could make the same file at once
    if args.jobs == 1:
        yield from map(one, tasks)
        return
    with get_context("spawn").Pool(args.jobs) as pool:
        yield from pool.imap_unordered(one, tasks)


def one(task: tuple[Spec, Path, Path]) -> dict[str, Any]:
    """Train and measure one spec; a failure is a result too."""
    spec, sandbox, out = task
    world = _world(sandbox, out)
    line: dict[str, Any] = {"key": spec.key(world.key), "head": spec.head, "beta": spec.beta, "seed": spec.seed}
    line |= {"steps": spec.steps, "learning_rate": spec.rate(), "term": spec.term(), "rows": spec.kind}
    start = time.process_time()
    try:
        trained = fit(world, training(spec, out))
        line |= measure(world, trained.plain, seed=1 + spec.seed)
    except (POError, LookupError, RuntimeError, ValueError) as e:
        line["error"] = f"{type(e).__name__}: {str(e).splitlines()[0][:200]}"
    return line | {"seconds": round(time.process_time() - start, 2)}


def training(spec: Spec, out: Path) -> Training:
    """What a spec asks of po."""
    needs = HEADS[spec.head].needs
    return Training(
        loss=(spec.term(),),
        rows=_rows(out, spec.kind),
        seed=spec.seed,
        steps=spec.steps,
        batch=spec.batch,
        learning_rate=spec.rate(),
        reference="adapter_off" if needs.live_reference else "cached",
    )


@cache
def _world(sandbox: Path, out: Path) -> World:
    environment(out / "cache")
    return open_world(sandbox)


def _rows(out: Path, kind: str) -> Path:
    return out / "rows" / f"{kind}.jsonl"


def _prepare(kinds: set[str], world: World, out: Path) -> None:
    """The rows of each kind; for `taught`, first the teacher: DPO with beta 0.3, 200 steps."""
    for kind in sorted(kinds):
        teacher = None
        if kind == "taught" and not _rows(out, kind).is_file():
            scored = derive(world, "scored", _rows(out, "scored"), world.train)
            teacher = fit(world, Training(({"head": "dpo", "beta": 0.3},), scored, steps=200)).plain
        derive(world, kind, _rows(out, kind), world.train, teacher)


def read(runs: Path) -> list[dict[str, Any]]:
    """The lines of a results file; the last one may have been cut off by an interruption."""
    lines = runs.read_text("utf-8").split("\n") if runs.is_file() else []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def _draw(plan: Sequence[Spec], runs: Path, world: World, out: Path, left_out: dict[str, str]) -> None:
    wanted = {s.key(world.key) for s in plan}
    last = {r["key"]: r for r in read(runs) if r["key"] in wanted}
    base = measure(world, world.model, seed=1)
    points, failed = frontier(list(last.values()))
    text = markdown(points, failed, left_out, base)
    (out / "frontier.md").write_text(text, "utf-8")
    print(text)
    try:
        from harness.plot import draw
    except ImportError:
        print("no plot: it needs matplotlib (pip install -e .[bench])")
        return
    if points:
        draw(points, base["reward"], out / "frontier.png")
        print(f"{out / 'frontier.md'} and {out / 'frontier.png'} written")


if __name__ == "__main__":
    sys.exit(main())
