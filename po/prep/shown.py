"""Rows with exactly the tokens that will be scored, or the reason why a row gives none."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import islice
from typing import Any

from po.data.formats import convert
from po.data.overlong import Limits, settle
from po.data.show import show
from po.data.tokenize import Encoder
from po.errors import UserError
from po.prep.inputs import open_inputs
from po.prep.rows import WANTED
from po.spec import Source


def shown(
    sources: Sequence[Source], tokenizer: Any, limits: Limits, ids: Collection[str], skip: int, limit: int
) -> Iterator[str]:
    """The text of each row: those with one of `ids` (or file:line), or `limit` rows after the first `skip`."""
    encode, missing = Encoder(tokenizer), set(ids)
    records = ((one.source, r) for one in open_inputs(sources) for r in one.records())
    for source, record in records if ids else islice(records, skip, skip + limit):
        row_id = str((record.data or {}).get("id", record.where))
        named = {row_id, record.where} & set(ids)
        if ids and not named:
            continue
        missing -= named
        done = convert(record, source, WANTED)
        if done.row is None:
            yield "\n".join(f"bad: {p}" for p in done.problems)
            continue
        out = settle(done.row, encode, limits)
        said = [line for name, line in out.lines.items() if name != "boundary"]
        said += [f"scored though it belongs to the prompt: {out.lines['boundary']}"] if "boundary" in out.lines else []
        text = f"bad: {out.problem}" if out.problem else f"{out.fate}, nothing is scored:"
        yield "\n".join([show(out.example, tokenizer) if out.example else text, *said])
        if ids and not missing:
            return
    if missing:
        raise UserError(f"no row has the id (or file:line) {', '.join(sorted(missing))}")
