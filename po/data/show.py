"""An example as a person reads it: which tokens are given, which are scored."""

from __future__ import annotations

from typing import Any

from po.data.rows import Example


def show(example: Example, tokenizer: Any) -> str:
    """The prompt, then each response with its scored tokens between bars: ' The| answer| is| 4|</s>'.

    What follows `prompt` is seen and not scored; every token after `response` is scored, end token included.
    """
    lines = [f"{example.where} (id {example.id})", f"prompt, {len(example.prompt_ids)} tokens, not scored:"]
    lines.append("  " + _tokens(example.prompt_ids, (), tokenizer))
    for k, ids in enumerate(example.response_ids):
        facts = [f"{len(ids)} tokens, scored"]
        if example.reward is not None:
            facts.append(f"reward {example.reward[k]:g}")
        if example.label is not None:
            facts.append(f"label {example.label[k]:+d}" if example.label[k] else "unlabelled")
        lines += [f"response {k}, {', '.join(facts)}:", "  " + _tokens(ids, example.prompt_ids, tokenizer)]
    return "\n".join(lines)


def _tokens(ids: tuple[int, ...], before: tuple[int, ...], tokenizer: Any) -> str:
    """Each token's text between bars: what it adds to the token before it, or its name in the vocabulary where it is no
    whole text by itself (a byte of a longer character)."""
    pieces = []
    for previous, i in zip((*before[-1:], *ids), ids) if before else zip((None, *ids), ids):
        left = "" if previous is None else tokenizer.decode([previous])
        both = tokenizer.decode([i] if previous is None else [previous, i])
        fine = both.startswith(left) and len(both) > len(left) and "\ufffd" not in both
        pieces.append(both[len(left) :] if fine else tokenizer.convert_ids_to_tokens(i))
    return "|".join(p.replace("\n", "\\n").replace("\r", "\\r").replace("|", "\\|") for p in pieces)
