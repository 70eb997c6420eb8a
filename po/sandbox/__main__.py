"""python -m po.sandbox build | demo | report RUN"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from po.endings import ending
from po.sandbox.demo import SANDBOX, demo, make, report


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m po.sandbox", description="A small world to try preference optimization in."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    building = commands.add_parser("build", help="pretrain the base model, sample and score its answers")
    building.add_argument("--out", type=Path, default=SANDBOX, help="the folder to write (default: %(default)s)")
    building.add_argument("--seed", type=int, default=0, help="decides everything (default: %(default)s)")
    commands.add_parser("demo", help="build, train recipes/quickstart.yaml, export, compare")
    reporting = commands.add_parser(
        "report", help="compare a run's exported adapter with the base on held-out questions"
    )
    reporting.add_argument("run", type=Path, help="the run's folder")
    reporting.add_argument("--sandbox", type=Path, default=SANDBOX, help="where its base is (default: %(default)s)")
    args = parser.parse_args(argv)
    disable_progress_bar()  # of loading a file of a few megabytes
    match args.command:
        case "build":
            return ending(lambda: _build(args.out, args.seed))
        case "demo":
            return ending(demo)
        case _:
            return ending(lambda: report(args.run, args.sandbox))


def _build(out: Path, seed: int) -> None:
    make(out, seed)


if __name__ == "__main__":
    sys.exit(main())
