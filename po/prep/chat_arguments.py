"""The arguments of scripts that ask a model: which one, where, and at what price."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, get_args

from po.errors import UserError
from po.prep.arguments import positive
from po.prep.chat import Chat
from po.prep.partial import beside
from po.spec import Dtype

JOURNAL = ".calls.jsonl"


def add_chat(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """The options; `chat` makes a Chat of them. required: the command cannot do without a model."""
    g = parser.add_argument_group("the model")
    g.add_argument("--model", required=required, help="a model folder or hub name; with --url the server's name for it")
    g.add_argument("--url", help="of an OpenAI-compatible server, mostly ending in /v1; none: the model runs here")
    g.add_argument("--key-env", metavar="VARIABLE", help="the environment variable that holds the server's key")
    g.add_argument("--concurrency", type=positive, default=16, help="requests at a time")
    g.add_argument("--timeout", type=float, default=120.0, help="seconds, of one try of a request")
    g.add_argument("--retries", type=int, default=5, help="of a request, after its first try")
    g.add_argument("--price-in", type=float, metavar="$", help="per million tokens of prompts, for the report")
    g.add_argument("--price-out", type=float, metavar="$", help="per million tokens of answers")
    g.add_argument("--server-token-ids", action="store_true", help="ask the server for token ids (vLLM gives them)")
    g.add_argument("--dtype", choices=get_args(Dtype), default="auto", help="of a model that runs here")
    g.add_argument("--device", help="of a model that runs here: cpu, cuda, cuda:1; none: a GPU if there is one")
    g.add_argument("--sequences", type=positive, default=64, help="that a model that runs here writes at once")


def chat(args: argparse.Namespace, output: Path) -> Chat:
    """The model that add_chat's arguments name, with its journal beside the output. A dry run writes none.

    Raises UserError for a model that cannot be loaded or a key that is not set.
    """
    if args.url is None:
        from po.prep.local import Local

        return Local(args.model, dtype=args.dtype, device=args.device, sequences=args.sequences)
    from po.prep.endpoint import Endpoint, Service

    if not args.url.startswith(("http://", "https://")):
        raise UserError("--url: expected an address that begins with http:// or https://")
    if args.timeout <= 0 or args.retries < 0:
        raise UserError("--timeout: expected more than 0 seconds, and --retries 0 or more")
    names = ("model", "url", "key_env", "concurrency", "timeout", "retries", "price_in", "price_out")
    service = Service(**{n: getattr(args, n) for n in names}, token_ids=args.server_token_ids)
    return Endpoint(service, beside(output, JOURNAL), read_only=getattr(args, "dry_run", False))


def chat_options(args: argparse.Namespace) -> dict[str, Any]:
    """What of them decides the bytes, for run_step's options. Where a server is does not: it may have moved."""
    if args.url is not None:
        return {"model": args.model, "server": True, "server_token_ids": args.server_token_ids}
    here = {name: getattr(args, name) for name in ("dtype", "device", "sequences")}
    return {"model": args.model, "server": False, **here}
