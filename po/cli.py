"""The command line: po train | check | sample | reward ... Thin: words are parsed, endings become exit codes.

Nothing heavy is imported before a command needs it, so that --help is instant.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence

from po.endings import ending
from po.errors import UserError
from po.words import FLAGS, parse, separate


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code (see `po --help`)."""
    words = list(sys.argv[1:] if argv is None else argv)
    return ending(lambda: _run(words))


def _run(words: list[str]) -> None:
    overrides: list[str] = []
    while words and words[0].startswith(("--local_rank=", "--local-rank=")):  # `deepspeed --module po.cli ...`
        words = words[1:]
    if words and words[0] in FLAGS:
        own, overrides = separate(words[1:], FLAGS[words[0]])
        words = [words[0], *own]
    args = parse(words)
    commands: dict[str, Callable[[argparse.Namespace, list[str]], None]] = {
        "train": _train,
        "check": _check,
        "sample": _sample,
        "reward": _reward,
        "heads": _heads,
        "export": _export,
        "likra": _likra,
        "compo": _compo,
    }
    commands[args.command](args, overrides)


def _train(args: argparse.Namespace, overrides: list[str]) -> None:
    from po.recipe import load

    recipe, notes = load(args.recipe, overrides)
    from po.run import train

    train(recipe, notes)
    _leave_together()


def _sample(args: argparse.Namespace, overrides: list[str]) -> None:
    from po.recipe import load

    recipe, notes = load(args.recipe, overrides)
    from po.sample import sample

    sample(recipe, notes)
    _leave_together()


def _reward(args: argparse.Namespace, overrides: list[str]) -> None:
    from po.reward_model.recipe import load

    if (args.output is None) == (args.action == "strength"):
        fits = "expected -o OUTPUT, e.g. -o judged.jsonl" if args.output is None else "-o is for `strength` alone"
        raise UserError(f"po reward {args.action}: {fits}")
    recipe, notes = load(args.recipe, overrides)
    if args.action == "check":
        from po.reward_model.run import check

        print("\n".join([*(f"note: {note}" for note in notes), check(recipe)]))
    elif args.action == "strength":
        from po.reward_model.strength import strength

        strength(recipe, args.output, args.force, notes)
    else:
        from po.reward_model.run import train

        train(recipe, notes)
        _leave_together()


def _leave_together() -> None:
    """Take the process group down on all ranks at once: a rank that exits first can abort the others' exit."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _check(args: argparse.Namespace, overrides: list[str]) -> None:
    from po.recipe import load, resolved, schema

    if args.schema:
        print(json.dumps(schema(), indent=2))
        return
    if args.recipe is None:
        raise UserError("po check: which recipe? Expected a YAML file, e.g. po check recipes/quickstart.yaml")
    recipe, notes = load(args.recipe, overrides)
    from po.run import check

    found = check(recipe)
    if args.json:
        print(json.dumps({"notes": notes, "found": found.splitlines(), "resolved": resolved(recipe)}, indent=2))
        return
    for note in notes:
        print(f"note: {note}")
    print(found)


def _heads(args: argparse.Namespace, overrides: list[str]) -> None:
    from po.recipe.explain import explain, listing

    print(listing() if args.head is None else explain(args.head))


def _export(args: argparse.Namespace, overrides: list[str]) -> None:
    from po.export import export_run
    from po.process import quiet

    quiet()
    print(export_run(args.run, args.out, args.merged, args.dtype, args.eval))


def _likra(args: argparse.Namespace, overrides: list[str]) -> None:
    from po.likra import evaluate
    from po.process import quiet

    quiet()
    print(evaluate(args.positive, args.negative, args.rows).table())


def _compo(args: argparse.Namespace, overrides: list[str]) -> None:
    from dataclasses import fields

    from po.compo import ComPO
    from po.compo_run import run

    given = {f.name: getattr(args, f.name) for f in fields(ComPO) if getattr(args, f.name) is not None}
    print(run(args.recipe, args.policy, args.out, ComPO(**given), args.split_only))


if __name__ == "__main__":
    sys.exit(main())
