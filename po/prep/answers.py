"""An OpenAI-compatible server's answers, as lines of the journal and as replies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from po.prep.chat import Reply


def read_answer(found: Any) -> list[dict[str, Any]]:
    """The replies of a (chat) completion, as JSON. AttributeError or TypeError where it is none."""
    prompt = getattr(found, "prompt_token_ids", None)
    out = []
    for choice in found.choices:
        said = _of_text(choice) if hasattr(choice, "text") else _of_chat(choice)
        ids = getattr(choice, "token_ids", None)
        said |= {"token_ids": ids, "prompt_ids": ids and (prompt or getattr(choice, "prompt_token_ids", None))}
        out.append({k: v for k, v in (said | {"finish_reason": choice.finish_reason}).items() if v is not None})
    return out


def tokens(found: Any) -> tuple[int, int]:
    """Of the prompt and of the answers, by the server's count; 0 where it gives none."""
    usage = found.usage
    return (usage.prompt_tokens or 0, usage.completion_tokens or 0) if usage else (0, 0)


def reply(said: Mapping[str, Any]) -> Reply:
    """What `read_answer` gave."""
    lists = {k: None if said.get(k) is None else tuple(said[k]) for k in ("logprobs", "top", "token_ids", "prompt_ids")}
    return Reply(said["text"], said.get("finish_reason"), **lists)


def _of_chat(choice: Any) -> dict[str, Any]:
    places = choice.logprobs.content if choice.logprobs else None
    if places is None:
        return {"text": choice.message.content or ""}
    top = [_likeliest((t.token, t.logprob) for t in p.top_logprobs or ()) for p in places]
    said = {"text": choice.message.content or "", "logprobs": [p.logprob for p in places]}
    return said | ({"top": top} if all(top) else {})


def _of_text(choice: Any) -> dict[str, Any]:
    found = choice.logprobs
    if found is None or found.token_logprobs is None:
        return {"text": choice.text}
    top = [_likeliest((p or {}).items()) for p in found.top_logprobs or ()]
    return {"text": choice.text, "logprobs": list(found.token_logprobs)} | ({"top": top} if top and all(top) else {})


def _likeliest(pairs: Iterable[tuple[str, float]]) -> dict[str, float]:
    """By text; of several tokens with one text the likeliest."""
    out: dict[str, float] = {}
    for text, logp in pairs:
        out[text] = max(logp, out.get(text, logp))
    return out
