"""Pairs from sets of scored answers: a rule, windows on the rewards, AIR's rules; or pairs that teach form alone."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from itertools import islice
from typing import Any, get_args

from po.errors import UserError
from po.prep.arguments import add_sources, add_step, end, parser, positive, running, sources
from po.prep.inputs import open_inputs
from po.prep.pairing import Rules, air
from po.prep.pairs import BreakFormat, Form, MakePairs, share
from po.prep.step import run_step
from po.spec import PairRule

WINDOWS = ("least_margin", "most_margin", "least_chosen", "most_variance", "per_prompt")


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    p = parser(__doc__ or "", "python data_prep/pair.py scored.jsonl -o pairs.jsonl --rule all --least-margin 2")
    add_sources(p)
    add_step(p)
    g = p.add_argument_group("pairs")
    g.add_argument("--rule", choices=(*get_args(PairRule), "format"), help="default: best_vs_worst; of --air: all")
    g.add_argument("--least-margin", type=float, metavar="R", help="of the two rewards, R included")
    g.add_argument("--most-margin", type=float, metavar="R", help="of the two rewards, R included")
    g.add_argument("--least-chosen", type=float, metavar="R", help="the chosen answer's reward, R included")
    g.add_argument("--most-variance", type=float, metavar="V", help="of the rewards of all answers, V included")
    g.add_argument("--per-prompt", type=positive, metavar="N", help="at most so many pairs, the widest margins first")
    g.add_argument("--air", action="store_true", help="AIR: variance 1.5, margin 2 to 3, chosen 8, half on-policy")
    g.add_argument("--form", choices=get_args(Form), default="pair", help="chosen and rejected, or a set of two")
    g.add_argument("--seed", type=int, default=0)
    g = p.add_argument_group("on-policy and off-policy pairs")
    g.add_argument("--on-policy", nargs="+", default=[], metavar="MODEL", help="the policy's own name(s) as `source`")
    g.add_argument("--on-policy-share", type=float, metavar="S", help="of the pairs; reads the input twice")
    g.add_argument("--any-policy", action="store_true", help="with --air: do without that rule")
    g = p.add_argument_group("--rule format (SPECS)")
    g.add_argument("--tags", nargs="+", default=["think", "answer"], help="the sections of the format, in order")
    g.add_argument("--right", type=float, default=1.0, help="an answer is right from this reward on")
    return p


def rules(args: argparse.Namespace) -> Rules:
    """What was asked for, over AIR's rules or none."""
    given = {name: getattr(args, name) for name in ("rule", *WINDOWS) if getattr(args, name) is not None}
    if args.rule == "margin" and args.least_margin is None:
        raise UserError("--rule margin: expected --least-margin as well")
    return dataclasses.replace(air() if args.air else Rules(), seed=args.seed, **given)


def wanted_share(args: argparse.Namespace) -> float | None:
    """The share of on-policy pairs, None where there is no such rule."""
    asked = args.on_policy_share
    if args.air and asked is None and not args.any_policy:
        asked = 0.5
    if asked is not None and not args.on_policy:
        raise UserError("the share of on-policy pairs needs --on-policy MODEL (or, with --air, --any-policy)")
    if asked is not None and not 0 <= asked <= 1:
        raise UserError(f"--on-policy-share: expected 0 to 1, got {asked:g}")
    return asked  # type: ignore[no-any-return]


def main(argv: Sequence[str] | None = None) -> None:
    """One run."""
    args = arguments().parse_args(argv)
    read = sources(args)
    options: dict[str, Any] = {k: v for k, v in vars(args).items() if k in ("rule", "air", "form", "seed", *WINDOWS)}
    if args.rule == "format":
        if args.air or args.on_policy or any(getattr(args, w) is not None for w in WINDOWS) or args.form != "pair":
            raise UserError("--rule format: goes with --tags, --right and --seed alone")
        options |= {"tags": args.tags, "right": args.right}
        run_step("pair", read, args.output, BreakFormat(read[0], tuple(args.tags), args.right, args.seed),
                 options=options, **running(args))  # fmt: skip
        return
    asked = wanted_share(args)
    work = MakePairs(read[0], rules(args), args.form, frozenset(args.on_policy), asked is not None)
    if asked is not None:
        records = islice((r for one in open_inputs(read) for r in one.records()), args.limit)
        work = dataclasses.replace(work, balance=share(records, work, asked))
    options |= {"on_policy": args.on_policy, "on_policy_share": asked}
    run_step("pair", read, args.output, work, options=options, **running(args))


if __name__ == "__main__":
    sys.exit(end(main))
