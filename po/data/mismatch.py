"""A response of another row for every group, for heads that compare with it. Fixed by the seed and the rows' content,
so that a reference cache can hold its log-probs; the order of the rows does not matter."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from po.data.rows import Example, Item, Other
from po.errors import UserError


def with_others(examples: Sequence[Example], items: Sequence[Item], seed: int) -> list[Item]:
    """The same items, each with a response of another prompt.

    The different prompts form a ring in an order drawn by the seed; every item takes one of the responses that the
    items of the next prompt hold, so never one of its own prompt. It is cut where it would make the sequence longer
    than the data's longest. Raises UserError where all rows have the same prompt.
    """
    offered: dict[bytes, dict[bytes, Other]] = {}  # by prompt, by response
    own: list[tuple[bytes, bytes, int]] = []  # per item: its prompt, what it draws with, tokens of its prompt
    longest = 0
    for item in items:
        e = examples[item.example]
        prompt = _lot(seed, e.prompt_ids)
        lots = [_lot(seed, e.response_ids[k]) for k in item.responses]
        for k, lot in zip(item.responses, lots):
            offered.setdefault(prompt, {}).setdefault(lot, Other(item.example, k, len(e.response_ids[k])))
            longest = max(longest, len(e.prompt_ids) + len(e.response_ids[k]))
        own.append((prompt, b"".join(lots), len(e.prompt_ids)))
    if len(offered) < 2:
        raise UserError(
            f"the data gives no response of another row: its {len(examples)} rows have one prompt. A head of the "
            "recipe compares with responses to other prompts; add rows that have others"
        )
    ring = sorted(offered)
    choices = {prompt: sorted(offered[after].items()) for prompt, after in zip(ring, [*ring[1:], ring[0]])}
    out = []
    for item, (prompt, draw, tokens) in zip(items, own):
        other = choices[prompt][int.from_bytes(_lot(seed, draw)) % len(choices[prompt])][1]
        out.append(replace(item, other=replace(other, tokens=min(other.tokens, longest - tokens))))
    return out


def _lot(seed: int, content: object) -> bytes:
    return hashlib.sha256(repr((seed, content)).encode()).digest()
