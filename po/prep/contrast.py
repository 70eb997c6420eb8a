"""What the strategies of contrast.py share: requests, replies that can be used, the pair that comes out of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from po.prep.asking import Left, said, seeded, without_tokens
from po.prep.chat import Ask, Reply
from po.prep.prompts import Prompt
from po.prep.rows import ScoredSet, pair_of

_SIDE = re.compile(r"(?:^|[_-])(?:chosen|rejected)(?:[_-]|$)")  # said of one of two answers
_OF_BOTH = {"margin", "margins", "preference", "strength", "strength_std", "flipped", "consistency", "policy"}
_THOUGHT = re.compile(r"^\s*<think>.*?</think>", re.DOTALL)  # of a reasoning model; it may speak of the marker
_MARKER = re.compile(r"\[\[[A-Z]+\]\]")


@dataclass(frozen=True)
class Sampling:
    """How a model is asked. Each request has a seed of its own, by this one and what the request is about."""

    temperature: float = 0.7
    top_p: float = 1.0
    max_tokens: int = 2048
    seed: int = 0

    def ask(self, messages: Sequence[Mapping[str, str]], *about: str, kind: type[Ask] = Ask, n: int = 1) -> Ask:
        """A request for so many answers."""
        how = {**asdict(self), "n": n, "seed": seeded(self.seed, *about, *(m["content"] for m in messages))}
        return kind(messages=tuple(messages), **how)


def whole(reply: Reply) -> str:
    """What a model said. Left where that is cut or empty."""
    if reply.finish_reason == "length":
        raise Left("a reply cut at --max-tokens")
    if not reply.text.strip():
        raise Left("an empty reply")
    return reply.text.strip()


def after(marker: str, reply: Reply) -> str:
    """What stands behind the marker, which may be emphasised or followed by a colon. Left without such."""
    said = _THOUGHT.sub("", whole(reply))
    parts = re.split(rf"[*_`#]*{re.escape(marker)}[*_`]*:?[*_`]*", said)
    if len(parts) < 2:
        raise Left("no marker in the reply")
    if len(parts) > 2 or _MARKER.search(parts[1]):
        raise Left("a marker left in the text")
    if not parts[1].strip():
        raise Left("nothing behind the marker")
    return parts[1].strip()


def one_text(read: ScoredSet, k: int) -> str:
    """An answer's text. Left where it is more than that."""
    content = read.row.responses[k].content
    text = said(content)
    if not text or (not isinstance(content, str) and set(content[0]) - {"role", "content"}):
        raise Left("an answer of more than text")
    return text


def apart(fields: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A row's fields without what belongs to sampled tokens: those that say something of the row, and those that say
    something of a chosen and a rejected answer."""
    said = without_tokens(fields)
    sided = {k: v for k, v in said.items() if _SIDE.search(k) or k in _OF_BOTH}
    return {k: v for k, v in said.items() if k not in sided}, sided


def contrast(
    read: ScoredSet,
    strategy: str,
    chosen: Mapping[str, Any],
    rejected: Mapping[str, Any],
    prompts: Sequence[Prompt],
    **more: Any,
) -> dict[str, Any]:
    """A pair after the row's own prompt. What was said of the row's former chosen and rejected, and these where they
    are not in the pair any more, moves into `original`."""
    fields, moved = apart(read.fields)
    if read.row.chosen_first:
        new = (chosen["content"], rejected["content"])
        for side, one in zip(("chosen", "rejected"), read.answers):
            moved |= {side: one["content"]} if one["content"] not in new else {}
            moved |= {f"{side}_reward": one["reward"]} if "reward" in one else {}
    if moved:
        fields["original"] = {**fields.get("original", {}), **moved}
    how = {"strategy": strategy, "prompts": [p.said for p in prompts], **more}
    return pair_of(fields, chosen, rejected, id=f"{read.row.id}/{strategy}", contrast=how)
