#!/usr/bin/env python3
"""What is wrong with a file of rows, and what it is made of. docs/data_prep.md has an example."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from rich.console import Console

from po.data.overlong import Limits
from po.errors import UserError
from po.prep import arguments
from po.prep.figures import histograms, statistics
from po.prep.findings import DROPPABLE, LIMITS, findings, to_drop, to_json
from po.prep.inputs import command, describe, open_inputs
from po.prep.kept import Kept
from po.prep.page import page
from po.prep.report import versions
from po.prep.run_check import Asked, LeaveOut, allowed, check_rows, missing, show_figures, show_findings
from po.prep.step import run_step
from po.spec import ModelSpec, Overlong, Source


def _parser() -> argparse.ArgumentParser:
    example = "python data_prep/check.py train.jsonl --tests test.jsonl --json check.json --html check.html"
    p = arguments.parser("What is wrong with a file of rows, and what it is made of.", example)
    arguments.add_sources(p)
    g = p.add_argument_group("checking")
    g.add_argument("--tests", nargs="+", default=[], help="test sets: rows with their prompts or n-grams are found")
    g.add_argument("--ngram", type=arguments.positive, default=8, help="words of an n-gram (default 8)")
    g.add_argument("--threshold", type=float, default=0.8, help="Jaccard similarity of near-duplicates (default 0.8)")
    g.add_argument("--no-near", action="store_true", help="do not look for near-duplicates")
    g.add_argument("--no-language", action="store_true", help="do not guess languages")
    g.add_argument("--allow", nargs="+", default=[], metavar="NAME=SHARE", help=f"limits: {', '.join(LIMITS)}")
    t = p.add_argument_group("tokens")
    t.add_argument("--model", help="folder or hub name whose tokenizer says what is scored and what is lost")
    t.add_argument("--chat-template", help="a Jinja file")
    t.add_argument("--max-length", type=arguments.positive, default=2048)
    t.add_argument("--max-prompt-length", type=arguments.positive)
    t.add_argument("--overlong", choices=get_args(Overlong), default="drop")
    r = p.add_argument_group("running")
    r.add_argument("--num-proc", type=arguments.positive, default=1, help="processes")
    r.add_argument("--limit", type=arguments.positive, help="the first so many rows")
    r.add_argument("--dry-run", action="store_true", help="print only, write no --json and no --html")
    r.add_argument("--drop", nargs="+", default=[], choices=DROPPABLE, help="findings whose rows --output goes without")
    r.add_argument("-o", "--output", type=Path, help="the rows without those of --drop; .jsonl, .jsonl.gz or .parquet")
    r.add_argument("--force", action="store_true", help="overwrite a finished output; begin a partial check anew")
    r.add_argument("--json", type=Path, help="the verdict, findings and statistics, for machines")
    r.add_argument("--html", type=Path, help="the same as a page with plots")
    return p


def _described(sources: Sequence[Source]) -> list[dict[str, Any]]:
    return [one for opened in open_inputs(sources) for one in describe(opened)] if sources else []


def _kept(args: argparse.Namespace, sources: Sequence[Source], asked: Asked) -> Kept | None:
    """Where the check is kept while it is made: beside the first that it writes, if anything."""
    target = args.output or args.json or args.html
    if args.output and args.output.exists() and not args.force and not args.dry_run:
        raise UserError(f"{args.output} exists; name another output, or overwrite it with --force")
    if target is None or args.dry_run:
        return None
    names = ("ngram", "no_near", "no_language", "model", "chat_template", "max_length", "max_prompt_length", "overlong")
    described: dict[str, Any] = {"step": "check", "limit": args.limit}
    described |= {"inputs": [{k: v for k, v in one.items() if k != "path"} for one in _described(sources)]}
    described |= {"tests": _described(asked.tests), "options": {n: getattr(args, n) for n in names}}
    return Kept(target, {**described, "lacking": missing(asked)}, args.force)


def main(argv: Sequence[str] | None = None) -> int:
    """Check; 0 where everything is within its limits, else 2."""
    parser, console = _parser(), Console()
    args = parser.parse_args(argv)
    if bool(args.drop) != bool(args.output):
        parser.error("--drop and --output go together")
    sources, allow = arguments.sources(args), allowed(args.allow)
    tokenizer = None
    if args.model:
        from po.policy import load_tokenizer

        tokenizer = load_tokenizer(ModelSpec(args.model, chat_template=args.chat_template))
    asked = Asked(
        [Source(path) for path in args.tests],
        args.ngram,
        not args.no_near,
        not args.no_language,
        tokenizer,
        Limits(args.max_length, args.max_prompt_length, args.overlong),
        args.num_proc,
        args.limit,
    )
    lacking, kept = missing(asked), _kept(args, sources, asked)
    check = check_rows(sources, asked, kept)
    found, figures = findings(check, args.threshold, allow), statistics(check)
    show_findings(found, console)
    show_figures(figures, console)
    if lacking:
        console.print(f"not looked at: {', '.join(lacking)}; pip install 'po[prep]'", markup=False)
    if args.json and not args.dry_run:
        context: dict[str, Any] = {"not_looked_at": lacking, "command": command(), "versions": versions()}
        context["inputs"] = _described(sources)
        args.json.write_text(json.dumps(to_json(check, found, context), indent=1) + "\n", encoding="utf-8")
    if args.html and not args.dry_run:
        title = "Check of " + ", ".join(args.inputs)
        args.html.write_text(page(title, found, figures, histograms(check)), encoding="utf-8")
    if args.output:
        dropped, tests = to_drop(check, found, args.drop), _described(asked.tests)
        options: dict[str, Any] = {"drop": args.drop, "threshold": args.threshold, "ngram": args.ngram, "tests": tests}
        how = {"limit": args.limit, "dry_run": args.dry_run, "force": args.force, "max_bad": allow.get("bad", 0.0)}
        run_step("check", sources, args.output, LeaveOut(dropped, sources[0]), options=options, **how)
    if kept:
        kept.done()
    wrong = [f.name for f in found if not f.fine and not (args.output and f.name in args.drop)]
    if wrong:
        sys.stderr.write(f"beyond their limits: {', '.join(wrong)} (--allow NAME=SHARE sets a limit)\n")
    return 2 if wrong else 0


if __name__ == "__main__":
    sys.exit(arguments.end(main))
