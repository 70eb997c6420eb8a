"""Comparisons and labels that are missing or wrong: completed (CURATRON), mended (preference strength), made (SSPO)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, get_args

from po.data.read import Record
from po.errors import UserError
from po.prep.arguments import add_sources, add_step, end, parser, running, sources
from po.prep.comparisons import Complete
from po.prep.curatron import CLIP, Method
from po.prep.inputs import open_inputs
from po.prep.pseudo import Kind
from po.prep.relabel import ByStrength, PseudoLabel, learn, strengths
from po.prep.step import run_step
from po.prep.strength import Bands, thresholds
from po.spec import Source


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    p = parser(__doc__ or "", "python data_prep/repair.py strength pairs.jsonl -o mended.jsonl --lowest flip")
    kinds = p.add_subparsers(dest="kind", required=True)
    complete = kinds.add_parser("complete", help="comparisons between a row's answers -> all of them, and rewards")
    strength = kinds.add_parser("strength", help="pairs with an ensemble's out-of-fold margins -> better labels")
    pseudo = kinds.add_parser("pseudo", help="answers without labels -> labels, by a threshold that others teach")
    for one in (complete, strength, pseudo):
        add_sources(one)
        add_step(one)
    complete.add_argument("--method", choices=get_args(Method), default="low_rank")
    complete.add_argument("--clip", type=float, default=CLIP, help="probabilities are at least this, at most 1 less it")
    complete.add_argument("--tolerance", type=float, default=1.0, help="logits that a comparison may be off by")
    add_bands(strength)
    pseudo.add_argument("--score", default="reward", metavar="FIELD", help="each answer's number")
    pseudo.add_argument("--threshold", choices=get_args(Kind), default="kde")
    pseudo.add_argument("--prior", type=float, default=0.5, help="P(desirable)")
    pseudo.add_argument("--bandwidth", type=float, default=1.0, help="of the smoothed distributions, in scores")
    pseudo.add_argument("--band", type=float, default=0.0, help="nearer to the threshold: no label")
    return p


def add_bands(p: argparse.ArgumentParser) -> None:
    """Which strengths are low, unsure and high, and what becomes of them."""
    p.add_argument("--lowest", choices=("flip", "soft", "drop", "keep"), default="flip", help="below the low threshold")
    p.add_argument("--unsure", choices=("soft", "drop", "keep"), default="keep", help="from there to the middle one")
    p.add_argument("--highest", choices=("smooth", "keep"), default="keep", help="from the high threshold on")
    p.add_argument("--low", type=float, default=0.0, help="strength; default 0: the ensemble disagrees with the label")
    p.add_argument("--middle", type=float, help="strength")
    p.add_argument("--high", type=float, help="strength")
    p.add_argument("--shares", type=float, nargs=3, metavar=("LOW", "MIDDLE", "HIGH"),
                   help="thresholds by shares of the pairs, e.g. 0.2 0.4 0.1; reads the input twice")  # fmt: skip
    p.add_argument("--smoothing", type=float, default=0.1, help="of the highest: preference is 1 less it")


def bands(args: argparse.Namespace, read: list[Source]) -> Bands:
    """By strengths as given, or by shares of what is read."""
    ways = {"lowest": args.lowest, "unsure": args.unsure, "highest": args.highest}
    if args.shares is None:
        given = {"low": args.low, "middle": args.middle, "high": args.high}
        return Bands(**{k: v for k, v in given.items() if v is not None}, **ways)
    if not all(0 <= s <= 1 for s in args.shares):
        raise UserError(f"--shares: expected three shares from 0 to 1, got {args.shares}")
    found = strengths(records(args, read), ByStrength(read[0], Bands()))
    return Bands(*thresholds(found, *args.shares), **ways)


def records(args: argparse.Namespace, read: list[Source]) -> Iterator[Record]:
    """What the step will read."""
    return islice((r for one in open_inputs(read) for r in one.records()), args.limit)


def main(argv: Sequence[str] | None = None) -> None:
    """One run."""
    args = arguments().parse_args(argv)
    read = sources(args)
    options: dict[str, Any]
    work: Complete | ByStrength | PseudoLabel
    if args.kind == "complete":
        options = {name: getattr(args, name) for name in ("method", "clip", "tolerance")}
        work = Complete(read[0], **options)
    elif args.kind == "strength":
        names = ("lowest", "unsure", "highest", "low", "middle", "high", "shares", "smoothing")
        options = {name: getattr(args, name) for name in names}
        work = ByStrength(read[0], bands(args, read), args.smoothing)
    else:
        options = {name: getattr(args, name) for name in ("score", "threshold", "prior", "bandwidth", "band")}
        try:
            at = learn(records(args, read), read[0], args.score).threshold(args.threshold, args.prior, args.bandwidth)
        except ValueError as e:
            raise UserError(f"{', '.join(args.inputs)}: {e}; give rows with labels and {args.score}") from e
        options["at"] = at
        work = PseudoLabel(read[0], at, args.score, args.band)
    run_step(f"repair {args.kind}", read, args.output, work, options=options, **running(args))


if __name__ == "__main__":
    sys.exit(end(main))
