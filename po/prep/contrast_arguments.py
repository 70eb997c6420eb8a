"""The arguments of contrast.py's subcommands, and how one that asks a model is run."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from po.data.read import Record
from po.prep.arguments import add_ray, batched, positive, running, sources
from po.prep.chat import Chat, Dialogue, together
from po.prep.chat_arguments import add_chat, chat_options
from po.prep.contrast import Sampling
from po.prep.prompts import Prompt
from po.prep.step import BatchWork, run_step


@dataclass(frozen=True)
class Command:
    """A subcommand: what it is, its arguments beside those of every script, and the run itself."""

    help: str
    add: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


def asking(
    args: argparse.Namespace, model: Chat, work: Callable[[Record], Dialogue], options: Mapping[str, Any]
) -> None:
    """Run a strategy that asks a model on every row."""
    run_step(
        f"contrast {args.kind}",
        sources(args),
        args.output,
        options={**chat_options(args), **options},
        **batched(args, partial(_asked, model, work)),
        **running(args),
    )


def _asked(model: Chat, work: Callable[[Record], Dialogue]) -> BatchWork:
    """A model here loads its weights when it is first asked, so in the actor that asks it."""
    return lambda records: together(model, [work(r) for r in records], [r.where for r in records])


def said(prompts: Iterable[Prompt]) -> dict[str, Any]:
    """The prompts as the report names them."""
    return {"prompts": [p.said for p in prompts]}


_DEFAULT = Sampling()


def add_asking(p: argparse.ArgumentParser, how: Sampling = _DEFAULT, required: bool = True) -> None:
    """The model, and how it is asked; how: the defaults."""
    add_chat(p, required)
    add_ray(p)
    g = p.add_argument_group("asking")
    g.add_argument("--temperature", type=float, default=how.temperature)
    g.add_argument("--top-p", type=float, default=how.top_p)
    g.add_argument("--max-tokens", type=positive, default=how.max_tokens, help="of a reply")
    g.add_argument("--seed", type=int, default=how.seed)
    add_prompts(p)


def add_prompts(p: argparse.ArgumentParser) -> None:
    """Texts instead of po's own."""
    p.add_argument("--prompt-file", nargs="+", default=[], metavar="ID=FILE", help="texts instead of po's own")


def sampling(args: argparse.Namespace) -> Sampling:
    """From add_asking's arguments."""
    return Sampling(args.temperature, args.top_p, args.max_tokens, args.seed)
