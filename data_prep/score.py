"""Scores for answers: reward models, verifiers, your functions, HTTP services, judges; several merged to one reward."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, get_args

from po.errors import UserError
from po.prep.arguments import add_ray, add_sources, add_step, batched, end, parser, positive, running, sources
from po.prep.chat_arguments import add_chat, chat_options
from po.prep.judge_spec import JudgeSpec
from po.prep.merge import Merging, check_weights
from po.prep.score import Build, Given, Missing
from po.prep.scorers import check_judges, described, stated
from po.prep.step import run_step


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    example = (
        "python data_prep/score.py sampled.jsonl -o scored.jsonl --scorer math --scorer '{model: rm, weight: 0.5}'"
    )
    p = parser(__doc__ or "", example)
    add_sources(p)
    add_step(p, num_proc=False)
    g = p.add_argument_group("scoring")
    g.add_argument("--scorer", action="append", default=[], metavar="ENTRY",
                   help="as in a recipe's rollout.rewards, or a judge: '{model: FOLDER, options: {kind: implicit, "
                   "reference: FOLDER}}', '{judge: pairwise}'; a word is a verifier or a kind of judge")  # fmt: skip
    g.add_argument("--scorers", metavar="FILE", help="YAML: `scorers:` and a list of such entries")
    g.add_argument("--merge", choices=get_args(Merging), default="weighted", help="of several scorers to the reward")
    g.add_argument("--missing", choices=get_args(Missing), default="bad",
                   help="what becomes of a row with an answer that lacks a score, or of the answer")  # fmt: skip
    g.add_argument("--given", choices=get_args(Given), default="refuse",
                   help="rewards that rows have: bad rows; the score `given`; merged as well; gone")  # fmt: skip
    g.add_argument("--batch", type=positive, default=64, metavar="ROWS", help="scored at once")
    g.add_argument("--tokenizer", metavar="MODEL", help="counts the tokens of text for verifiers that read lengths")
    add_chat(p, required=False)
    add_ray(p)
    return p


def main(argv: Sequence[str] | None = None) -> None:
    """One run."""
    args = arguments().parse_args(argv)
    read, entries = sources(args), stated(args.scorers, args.scorer)
    check_weights(args.merge, [(e.place, e.spec.weight) for e in entries])
    if all(e.spec.weight == 0 for e in entries) and args.given != "merge":
        raise UserError("every scorer has the weight 0, so that none makes the reward; give one another weight")
    check_judges(entries, args)
    options: dict[str, Any] = {"scorers": described(entries, args)}
    options |= {k: getattr(args, k) for k in ("merge", "missing", "given", "batch", "tokenizer", "device")}
    if any(isinstance(e.spec, JudgeSpec) for e in entries):
        options |= chat_options(args)
    how = batched(args, Build(read[0], tuple(entries), args))
    try:
        run_step("score", read, args.output, batch=args.batch, options=options, **how, **running(args))
    finally:
        if "batch_work" in how:
            how["batch_work"].close()


if __name__ == "__main__":
    sys.exit(end(main))
