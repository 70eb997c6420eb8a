#!/usr/bin/env python3
"""Rows with exactly the tokens that will be scored. docs/data_prep.md has an example."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import get_args

from po.data.overlong import Limits
from po.prep import arguments
from po.prep.shown import shown
from po.spec import ModelSpec, Overlong


def main(argv: Sequence[str] | None = None) -> int:
    """Print; the exit code."""
    example = "python data_prep/show.py train.jsonl --model MODEL --limit 3"
    p = arguments.parser("Rows with exactly the tokens that will be scored.", example)
    arguments.add_sources(p)
    p.add_argument("--model", required=True, help="folder or hub name of the tokenizer")
    p.add_argument("--chat-template", help="a Jinja file")
    p.add_argument("--ids", nargs="+", default=[], help="rows by id, or by file:line")
    p.add_argument("--skip", type=int, default=0, help="leave out the first so many rows")
    p.add_argument("--limit", type=arguments.positive, default=3, help="rows to show (default 3)")
    p.add_argument("--max-length", type=arguments.positive, default=2048)
    p.add_argument("--max-prompt-length", type=arguments.positive)
    p.add_argument("--overlong", choices=get_args(Overlong), default="drop")
    args = p.parse_args(argv)
    from po.policy import load_tokenizer

    tokenizer = load_tokenizer(ModelSpec(args.model, chat_template=args.chat_template))
    limits = Limits(args.max_length, args.max_prompt_length, args.overlong, least=1)
    for text in shown(arguments.sources(args), tokenizer, limits, args.ids, args.skip, args.limit):
        print(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(arguments.end(main))
