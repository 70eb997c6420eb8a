"""Which answers of a set to train on (AMPO), what they weigh (MPO), and which rows are worth a label."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from functools import partial
from itertools import islice
from typing import get_args

from po.errors import UserError
from po.prep.arguments import add_ray, add_sources, add_step, batched, end, parser, positive, running, sources
from po.prep.inputs import open_inputs
from po.prep.medoids import ENUMERATED
from po.prep.select import Negatives, Rule, Unsure, Weights, most
from po.prep.step import BatchWork, Work, run_step
from po.prep.uncertainty import Measure

OPTIONS = {
    "negatives": ("rule", "k", "embedder", "max_tokens", "enumerated", "seed"),
    "weights": ("alpha", "power", "signed", "standardize", "drop_median"),
    "unsure": ("measure", "scale", "scores"),
}


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    p = parser(__doc__ or "", "python data_prep/subset.py negatives scored.jsonl -o sets.jsonl --rule bottom_k -k 3")
    kinds = p.add_subparsers(dest="kind", required=True)
    negatives = kinds.add_parser("negatives", help="AMPO: the best answer and k of the others")
    weights = kinds.add_parser("weights", help="MPO: a weight for each answer by its distance from the mean reward")
    unsure = kinds.add_parser("unsure", help="the rows whose preference is the least sure")
    for one in (negatives, weights, unsure):
        add_sources(one)
        add_step(one)
    negatives.add_argument("--rule", choices=get_args(Rule), required=True)
    negatives.add_argument("-k", type=positive, required=True, help="negatives")
    negatives.add_argument("--embedder", metavar="FOLDER", help="a model; without it answers bring `embedding`")
    negatives.add_argument("--max-tokens", type=positive, default=512, help="of a text that is embedded")
    negatives.add_argument("--enumerated", type=int, default=ENUMERATED, help="opt_select: subsets to try at most")
    negatives.add_argument("--seed", type=int, default=0, help="of coreset's clusters")
    add_ray(negatives)
    weights.add_argument("--alpha", type=float, default=1.0)
    weights.add_argument("--power", type=int, choices=(0, 1, 2), default=1, help="W-0, W-1, W-2")
    weights.add_argument("--signed", action="store_true", help="answers below the mean weigh less (REFA)")
    weights.add_argument("--standardize", action="store_true", help="in units of the row's standard deviation")
    weights.add_argument("--drop-median", action="store_true", help="leave the median answer out")
    unsure.add_argument("--measure", choices=get_args(Measure), default="margin")
    unsure.add_argument("--budget", type=positive, metavar="N", help="keep so many rows; reads the input twice")
    unsure.add_argument("--scale", type=float, default=1.0, help="entropy: rewards are multiplied by it")
    unsure.add_argument("--scores", default="scores", metavar="FIELD", help="each answer's numbers, one per scorer")
    return p


def each(work: Work) -> BatchWork:
    """One record after the other, by an actor that keeps the embedder."""
    return lambda records: [work(record) for record in records]


def main(argv: Sequence[str] | None = None) -> None:
    """One run."""
    args = arguments().parse_args(argv)
    read = sources(args)
    asked = {name: getattr(args, name) for name in OPTIONS[args.kind]}
    name, options = f"select {args.kind}", dict(asked)
    kinds: dict[str, type[Negatives] | type[Weights]] = {"negatives": Negatives, "weights": Weights}
    if args.kind in kinds:
        work: Negatives | Weights | Unsure = kinds[args.kind](read[0], **asked)
    else:
        work, options["budget"] = Unsure(read[0], **asked), args.budget
        if args.budget is not None:
            records = islice((r for one in open_inputs(read) for r in one.records()), args.limit)
            work = dataclasses.replace(work, least=most(records, work, args.budget).least)
    if getattr(args, "ray", None) is None:
        run_step(name, read, args.output, work, options=options, **running(args))
        return
    if args.embedder is None:
        raise UserError("--ray: is for --embedder; without a model --num-proc serves")
    how = batched(args, partial(each, work))
    run_step(name, read, args.output, options=options, **{**running(args), "num_proc": 1}, **how)


if __name__ == "__main__":
    sys.exit(end(main))
