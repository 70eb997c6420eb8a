"""An example as a person reads it: which tokens are given, which are scored."""

from __future__ import annotations

from typing import Any

from po.data.rows import Example


def show(example: Example, tokenizer: Any) -> str:
    """The prompt, then each response with its scored tokens between bars: ' The| answer| is| 4|</s>'.

    What follows `prompt` is seen and not scored; every token after `response` is scored, end token included.
    """
    lines = [f"{example.where} (id {example.id})", f"prompt, {len(example.prompt_ids)} tokens, not scored:"]
    lines.append("  " + _tokens(example.prompt_ids, tokenizer))
    for k, ids in enumerate(example.response_ids):
        facts = [f"{len(ids)} tokens, scored"]
        if example.reward is not None:
            facts.append(f"reward {example.reward[k]:g}")
        if example.label is not None:
            facts.append(f"label {example.label[k]:+d}")
        lines += [f"response {k}, {', '.join(facts)}:", "  " + _tokens(ids, tokenizer)]
    return "\n".join(lines)


def _tokens(ids: tuple[int, ...], tokenizer: Any) -> str:
    """Each token's own text between bars; a token that is no whole text by itself as its name in the vocabulary."""
    names = tokenizer.convert_ids_to_tokens(list(ids))
    return "|".join(_printable(name) for name in names)


def _printable(name: str) -> str:
    return name.replace("\n", "\\n").replace("\r", "\\r").replace("|", "\\|")
