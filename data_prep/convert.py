#!/usr/bin/env python3
"""Preference data in other people's formats -> po's rows. docs/data_prep.md has an example of each."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import get_args

from po.errors import UserError
from po.prep import arguments
from po.prep.convert import Convert, look, prompt_key
from po.prep.formats import BY_NAME, named
from po.prep.human import HELPSTEER
from po.prep.inputs import open_inputs
from po.prep.reading import Bug, Choices, Rule
from po.prep.step import run_step


def _parser() -> argparse.ArgumentParser:
    example = "python data_prep/convert.py ultrafeedback.jsonl --rule argilla -o pairs.jsonl"
    p = arguments.parser("Preference data in other people's formats -> po's rows.", example)
    arguments.add_sources(p)
    arguments.add_step(p)
    g = p.add_argument_group("formats")
    g.add_argument("--format", default="auto", help=f"auto, {', '.join(BY_NAME)} (default: auto, row by row)")
    dress = g.add_mutually_exclusive_group()
    dress.add_argument("--chat", action="store_true", help="plain prompts become messages")
    dress.add_argument("--template", help="around plain prompts, e.g. 'Question: {prompt}\\nAnswer: '")
    g.add_argument(
        "--rule", choices=get_args(Rule), default="sets", help="UltraFeedback: sets of four, or pairs by a rule"
    )
    g.add_argument("--score", choices=("overall", "mean"), default="overall", help="UltraFeedback: the reward of sets")
    g.add_argument("--score-bug", choices=get_args(Bug), default="drop", help="UltraFeedback: 10s that were 1s")
    g.add_argument("--attribute", choices=HELPSTEER, default="helpfulness", help="HelpSteer: what is the reward")
    g.add_argument("--min-ratio", type=float, default=2.0, help="SHP: least ratio of the two scores (default 2)")
    g.add_argument("--seed", type=int, default=0, help="UltraFeedback: draws of a random rejected response")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Convert; the exit code."""
    args = _parser().parse_args(argv)
    sources, given = arguments.sources(args), named(args.format)
    found = [look(one, given) for one in open_inputs(sources)]
    for one in found:
        print(one.line(given))
    names = ("rule", "score", "score_bug", "attribute", "min_ratio", "seed")
    chosen = {n: getattr(args, n) for n in names}
    template = None if args.template is None else args.template.replace("\\n", "\n")
    if template is not None and "{prompt}" not in template:
        raise UserError(f"--template: expected {{prompt}} in it, got {template!r}")
    work = Convert(sources[0], Choices(**chosen), given, args.chat, template)
    joined = ["helpsteer" in one.formats for one in found]
    if any(joined) and not all(joined):
        raise UserError("helpsteer rows are joined with their neighbours; convert the other files by themselves")
    how = {"batch_work": work.together, "batch": prompt_key} if any(joined) else {"work": work}
    options = {"format": args.format, "chat": args.chat, "template": template, **chosen}
    run_step("convert", sources, args.output, options=options, **how, **arguments.running(args))
    return 0


if __name__ == "__main__":
    sys.exit(arguments.end(main))
