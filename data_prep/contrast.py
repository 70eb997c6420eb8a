"""Pairs made for contrast, mostly by asking a model: revisions (clair, bmc), contrasting circumstances (popalign),
prompts that tell how good what follows is (nat), refinements found by search (spar), a model's own judgement
(self_rewarding, pu_rl), the step at which a solution fails (steps). Pairs that teach form alone (SPECS): pair.py
--rule format."""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, get_args

from po.errors import UserError
from po.prep.arguments import add_sources, add_step, end, parser, running, sources
from po.prep.chat import Chat
from po.prep.chat_arguments import chat, chat_options
from po.prep.contrast_arguments import Command, add_asking, add_prompts, asking, said, sampling
from po.prep.contrast_prompts import BMC, CLAIR, NAT_PARTLY, NAT_RIGHT, NAT_WRONG, POPALIGN
from po.prep.nat import Place, Tell
from po.prep.partial import beside
from po.prep.popalign import MODELS, PopAlign, Strategy
from po.prep.prompts import replaced
from po.prep.revise import Revise
from po.prep.search_arguments import COMMANDS as SEARCHES
from po.prep.second import Nobody, Two
from po.prep.step import run_step


def add_revise(p: argparse.ArgumentParser) -> None:
    """clair and bmc."""
    add_asking(p)
    p.add_argument(
        "--least-jaccard",
        type=float,
        default=Revise.least_jaccard,
        metavar="J",
        help="share of words that a revision has in common with what it revises; 0 for answers of a few words",
    )


def revise(args: argparse.Namespace) -> None:
    """clair and bmc."""
    prompt = replaced([CLAIR if args.kind == "clair" else BMC], args.prompt_file)[args.kind]
    model, how = chat(args, args.output), sampling(args)
    work = Revise(sources(args)[0], args.kind, prompt, model.name, how, args.least_jaccard)
    asking(args, model, work, {**asdict(how), "least_jaccard": args.least_jaccard, **said([prompt])})


def add_popalign(p: argparse.ArgumentParser) -> None:
    """popalign."""
    add_asking(p, required=False)
    g = p.add_argument_group("strategies")
    g.add_argument(
        "--strategies", nargs="+", choices=get_args(Strategy), default=["prefix", "demon", "elicitive", "refine"]
    )
    g.add_argument("--weak-model", help="for nparam a smaller one of the family, for leaderboard a lower one")
    g.add_argument("--weak-url", help="of its server; none: it runs here")
    g.add_argument("--weak-key-env", metavar="VARIABLE", help="the variable with that server's key")
    g.add_argument(
        "--given",
        nargs=3,
        action="append",
        default=[],
        metavar=("STRATEGY", "BETTER", "WORSE"),
        help="nparam or leaderboard by the row's own answers, with these as `source`",
    )


def popalign(args: argparse.Namespace) -> None:
    """popalign."""
    given = {strategy: (better, worse) for strategy, better, worse in args.given}
    if set(given) - set(MODELS) or set(given) - set(args.strategies):
        raise UserError("--given: expected nparam or leaderboard, and that among --strategies")
    asked = [s for s in args.strategies if s not in given]
    compared = [s for s in asked if s in MODELS]
    if len(compared) > 1:
        raise UserError("nparam and leaderboard by one weaker model are the same pairs; run twice, or see --given")
    if bool(compared) != bool(args.weak_model):
        raise UserError("--weak-model: goes with nparam or leaderboard, and these need it (or --given)")
    if bool(asked) != bool(args.model):
        raise UserError("--model: expected one, unless all pairs are --given")
    prompts, how = replaced(POPALIGN, args.prompt_file), sampling(args)
    model: Chat = chat(args, args.output) if asked else Nobody()
    options: dict[str, Any] = {"strategies": args.strategies, "given": given, **asdict(how), **said(prompts.values())}
    if compared:
        weak = copy.copy(args)
        weak.model, weak.url, weak.key_env = args.weak_model, args.weak_url, args.weak_key_env
        model = Two(model, chat(weak, beside(args.output, ".weak")))
        options["weak"] = chat_options(weak)
    names = (model.name, args.weak_model or "")
    asking(args, model, PopAlign(sources(args)[0], args.strategies, names, given, prompts, how), options)


def add_nat(p: argparse.ArgumentParser) -> None:
    """nat."""
    add_prompts(p)
    p.add_argument(
        "--thresholds", type=float, nargs="+", default=[], metavar="R", help="one or two: better is a reward above it"
    )
    p.add_argument("--place", choices=get_args(Place), default="end", help="of what the user said last")
    p.add_argument("--inference", action="store_true", help="rows are prompts; all get the text for right answers")


def nat(args: argparse.Namespace) -> None:
    """nat."""
    if len(args.thresholds) > 2 or args.thresholds != sorted(set(args.thresholds)):
        raise UserError("--thresholds: expected one number, or two, the lower first")
    own = [NAT_WRONG, *([NAT_PARTLY] if len(args.thresholds) == 2 else []), NAT_RIGHT]
    prompts = tuple(replaced(own, args.prompt_file).values())
    options = {"thresholds": args.thresholds, "place": args.place, "inference": args.inference}
    read = sources(args)
    work = Tell(read[0], prompts, **options)
    run_step("contrast nat", read, args.output, work, options={**options, **said(prompts)}, **running(args))


COMMANDS = {
    "clair": Command("the worst answer, and a model's minimal revision over it", add_revise, revise),
    "bmc": Command("the worse answer, edited towards the better, over itself", add_revise, revise),
    "popalign": Command("six ways to get a better and a worse answer to a prompt", add_popalign, popalign),
    "nat": Command("labelled answers after prompts that tell how good they are (asks no model)", add_nat, nat),
    **SEARCHES,
}
ALONE = {"nat"}  # ask no model, so that processes help


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    p = parser(__doc__ or "", "python data_prep/contrast.py clair rows.jsonl -o pairs.jsonl --model M --url URL/v1")
    kinds = p.add_subparsers(dest="kind", required=True)
    for name, command in COMMANDS.items():
        one = kinds.add_parser(name, help=command.help)
        add_sources(one)
        add_step(one, num_proc=name in ALONE)
        command.add(one)
    return p


def main(argv: Sequence[str] | None = None) -> None:
    """One run."""
    args = arguments().parse_args(argv)
    COMMANDS[args.kind].run(args)


if __name__ == "__main__":
    sys.exit(end(main))
