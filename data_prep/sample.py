"""K responses to each prompt, from a model folder, a hub name or an OpenAI-compatible server: at several temperatures,
after several system prompts, without near-duplicates, with the sampler's log-probs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from po.errors import UserError
from po.prep.arguments import add_ray, add_sources, add_step, batched, end, parser, positive, running, sources
from po.prep.chat import together
from po.prep.chat_arguments import add_chat, chat, chat_options
from po.prep.sample import Draws, Sample, options
from po.prep.step import BatchWork, run_step
from po.spec import Source


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    p = parser(__doc__ or "", "python data_prep/sample.py prompts.jsonl -o sampled.jsonl --model MODEL -k 8")
    add_sources(p)
    add_step(p, num_proc=False)
    add_chat(p)
    add_ray(p)
    g = p.add_argument_group("drawing")
    g.add_argument("-k", type=positive, required=True, help="responses to each prompt")
    g.add_argument("--temperature", type=float, nargs="+", default=[1.0], metavar="T", help="in turn over the K")
    g.add_argument("--top-p", type=float, default=1.0)
    g.add_argument("--max-tokens", type=positive, default=512, help="of a response")
    g.add_argument("--stop", nargs="+", default=[], metavar="TEXT", help="ends a response, and is not part of it")
    g.add_argument("--system", nargs="+", default=[], metavar="TEXT", help='system prompts; "" is the prompt as it is')
    g.add_argument("--system-file", type=Path, help="one system prompt a line")
    g.add_argument("--system-by", choices=("cycle", "lot"), default="cycle", help="in turn, or drawn by --seed")
    g.add_argument(
        "--system-in-prompt", action="store_true", help="a row for each system prompt, with it in its prompt"
    )
    g.add_argument("--chat", action="store_true", help="a prompt that is text becomes a user's message")
    g.add_argument("--seed", type=int, default=0)
    g.add_argument("--batch", type=positive, default=64, help="rows that are asked for at once")
    g = p.add_argument_group("what stays")
    g.add_argument("--near", type=float, default=0.8, metavar="S",
                   help="a response goes that is so like an earlier one (Jaccard of word triples)")  # fmt: skip
    g.add_argument("--duplicates", choices=("drop", "keep"), default="drop", help="keep: equal ones stay, too")
    g.add_argument("--refill", type=int, default=0, metavar="N", help="at most so many more draws to get K that stay")
    g.add_argument("--truncated", choices=("keep", "drop"), default="keep", help="responses cut at --max-tokens")
    g.add_argument("--least", type=positive, help="rows with fewer responses are dropped; default 2, with -k 1 it is 1")
    g.add_argument("--add", action="store_true", help="to the responses that a row has, which move away otherwise")
    g.add_argument("--no-logps", action="store_true", help="for servers that do not give log-probs")
    return p


def draws(args: argparse.Namespace) -> Draws:
    """What was asked for. Raises UserError for what cannot be."""
    if not all(0 <= t <= 2 for t in args.temperature) or not 0 < args.top_p <= 1:
        raise UserError("--temperature: expected 0 to 2, and --top-p above 0, at most 1")
    if not 0 < args.near <= 1 or args.refill < 0:
        raise UserError("--near: expected above 0, at most 1, and --refill 0 or more")
    if args.temperature == [0.0] and args.duplicates == "drop" and args.k > max(1, len(systems(args))):
        raise UserError(
            "--temperature 0: every draw is the same; expected -k 1, as many --system, or other temperatures"
        )
    if args.system_in_prompt and (args.add or not systems(args)):
        raise UserError("--system-in-prompt: needs --system or --system-file, and does not go with --add")
    names = ("k", "top_p", "max_tokens", "system_by", "system_in_prompt", "seed", "near", "duplicates", "refill",
             "truncated", "add", "chat")  # fmt: skip
    return Draws(
        **{n: getattr(args, n) for n in names},
        temperatures=tuple(args.temperature),
        stop=tuple(args.stop),
        systems=tuple(systems(args)) or ("",),
        least=args.least or min(2, args.k),
        logps=not args.no_logps,
    )


def systems(args: argparse.Namespace) -> list[str]:
    """The system prompts, each once."""
    if args.system_file is None:
        return list(dict.fromkeys(args.system))
    if not args.system_file.is_file():
        raise UserError(f"--system-file: there is no file {args.system_file}")
    lines = args.system_file.read_text("utf-8").splitlines()
    return list(dict.fromkeys([*args.system, *(line.strip() for line in lines if line.strip())]))


def prepared(args: argparse.Namespace, how: Draws, source: Source) -> BatchWork:
    """The model loaded, and what is done with it."""
    from po.prep.local import Local

    model = chat(args, args.output)
    work = Sample(source, how, model.name, model if isinstance(model, Local) else None)
    return lambda records: together(model, [work(r) for r in records], [r.where for r in records])


def main(argv: Sequence[str] | None = None) -> None:
    """One run."""
    args = arguments().parse_args(argv)
    how, read = draws(args), sources(args)
    run_step(
        "sample",
        read,
        args.output,
        options={**options(how), **chat_options(args), "batch": args.batch},
        batch=args.batch,
        **batched(args, partial(prepared, args, how, read[0])),
        **running(args),
    )


if __name__ == "__main__":
    sys.exit(end(main))
