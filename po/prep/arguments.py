"""The arguments that every script of data_prep/ has, and how a script ends."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

from po.errors import POError, UserError
from po.prep.on_ray import OnRay
from po.prep.step import BatchWork
from po.spec import RankOrder, Source


def parser(description: str, example: str) -> argparse.ArgumentParser:
    """A parser whose --help ends with an example."""
    return argparse.ArgumentParser(
        description=description,
        epilog=f"example:\n  {example}\n\nexit codes: 0 done; 2 the command or the data is wrong",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_sources(p: argparse.ArgumentParser) -> None:
    """What is read, and how its columns are to be understood."""
    p.add_argument("inputs", nargs="+", help="files (.jsonl, .json, .parquet, .gz), patterns, folders, hub names")
    g = p.add_argument_group("reading")
    g.add_argument("--columns", nargs="+", default=[], metavar="OURS=THEIRS", help="columns under other names")
    g.add_argument("--rank-order", choices=get_args(RankOrder), help="mandatory where rows carry ranks")
    g.add_argument("--separator", help="ends the prompt in plain strings that hold prompt and response")
    g.add_argument("--split", help="of a folder or hub dataset")
    g.add_argument("--name", help="configuration of a hub dataset")


def add_step(p: argparse.ArgumentParser, num_proc: bool = True) -> None:
    """What is written, how much, and by how many. The keywords of run_step."""
    p.add_argument("-o", "--output", type=Path, required=True, help="ends in .jsonl, .jsonl.gz or .parquet")
    g = p.add_argument_group("running")
    g.add_argument("--limit", type=positive, help="the first so many rows")
    g.add_argument("--dry-run", action="store_true", help="read and work, write nothing, print the report")
    g.add_argument("--max-bad", type=float, default=0.0, help="bad rows to go on without: a share below 1, or a count")
    g.add_argument("--force", action="store_true", help="overwrite a finished output; begin a partial one anew")
    if num_proc:
        g.add_argument("--num-proc", type=positive, default=1, help="processes")


def add_ray(p: argparse.ArgumentParser) -> None:
    """Where the model of a step runs; `batched` makes it so."""
    g = p.add_argument_group("many machines")
    g.add_argument("--ray", type=positive, metavar="N", help="N copies of the model as Ray actors (needs po[ray])")
    g.add_argument(
        "--ray-gpus", type=float, metavar="G", help="of each copy, also 0 or 0.5; default: 1 if there is any"
    )
    g.add_argument(
        "--ray-address", metavar="ADDRESS", help="of a cluster: auto, host:port; default: this machine alone"
    )


def batched(args: argparse.Namespace, build: Callable[[], BatchWork]) -> dict[str, Any]:
    """run_step's keyword for work on batches: here, or by the actors that add_ray's arguments ask for.

    build: loads the model and gives the work; it must be possible to pickle it.
    """
    if args.ray is None:
        if args.ray_gpus is not None or args.ray_address is not None:
            raise UserError("--ray-gpus and --ray-address go with --ray N")
        return {"batch_work": build()}
    if any(value is not None for name, value in vars(args).items() if name == "url" or name.endswith("_url")):
        raise UserError("--ray: is for models that are loaded; a --url is asked by one machine (--concurrency)")
    if args.ray_gpus is not None and args.ray_gpus < 0:
        raise UserError(f"--ray-gpus: expected 0 or more, got {args.ray_gpus:g}")
    return {"pool": OnRay(build, args.ray, args.ray_gpus, args.ray_address)}


def positive(text: str) -> int:
    """A whole number from 1 on."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text}")
    return value


def sources(args: argparse.Namespace) -> list[Source]:
    """The sources that add_sources' arguments name."""
    columns = {}
    for pair in args.columns:
        ours, sign, theirs = pair.partition("=")
        if not (ours and sign and theirs):
            raise UserError(f"--columns: expected OURS=THEIRS, got {pair!r}")
        columns[ours] = theirs
    options: dict[str, Any] = {"columns": columns, "rank_order": args.rank_order, "separator": args.separator}
    return [Source(path, name=args.name, split=args.split, **options) for path in args.inputs]


def running(args: argparse.Namespace) -> dict[str, Any]:
    """run_step's keywords from add_step's arguments."""
    names = ("limit", "dry_run", "max_bad", "force", "num_proc")
    return {n: getattr(args, n) for n in names if hasattr(args, n)}


def end(main: Callable[[Sequence[str] | None], int | None], argv: Sequence[str] | None = None) -> int:
    """Run a script's main; errors that are explained go to stderr without a traceback. The exit code."""
    try:
        return main(argv) or 0
    except POError as e:
        sys.stderr.write(f"error: {e}\n")
        return e.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command goes on where it stopped\n")
        return 130
