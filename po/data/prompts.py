"""A record's prompt, given or implicit, and its responses: text after text, messages after messages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from po.data.messages import (
    Messages,
    check_prompt,
    check_response,
    common_prompt,
    is_message,
    messages,
    split_strings,
    text,
)
from po.data.report import NOTHING, Faults, Say
from po.data.view import Candidate, View

TEXTS = ("prompt", "instruction", "question", "input", "query")
CONVERSATIONS = ("messages", "conversations", "context")
PROMPTS = (*TEXTS, *CONVERSATIONS)
Content = str | Messages


@dataclass(frozen=True)
class Prompt:
    """What the record says about its prompt. value is None where it has none, or a wrong one (then given is True)."""

    field: str
    value: Content | None
    given: bool


def find_prompt(view: View, candidates: Sequence[Candidate]) -> Prompt:
    """The prompt that the record states; a system text and earlier turns make it a conversation."""
    inside = candidates and candidates[0].field in CONVERSATIONS  # the messages hold the response too
    found = view.first(TEXTS) or (None if inside else view.first(CONVERSATIONS))
    if found is None:
        return _absent(view)
    name, value = found
    faults = view.faults
    if name in CONVERSATIONS and any(isinstance(m, dict) and "from" in m for m in value):
        view.notes.append("sharegpt")
    if not isinstance(value, str):
        conversation = messages(value, name, faults)
        if conversation and conversation[0]["role"] != "system":
            conversation = (*system(view), *conversation)
        if conversation:
            check_prompt(conversation, name, faults)
        return Prompt(name, conversation, True)
    prompt = text(value, name, faults)
    extra = view.get("input") if name == "instruction" else None
    if extra is not None:
        view.notes.append("alpaca")
        if not isinstance(extra, str):
            faults.add("input", "text", extra)
        elif prompt and extra.strip():
            prompt = f"{prompt}\n{extra}"
    if prompt is not None and ("system" in view.data or "history" in view.data):
        return Prompt(name, (*system(view), *_history(view), {"role": "user", "content": prompt}), True)
    return Prompt(name, prompt, True)


def _absent(view: View) -> Prompt:
    null = [k for k in PROMPTS if k in view.data and view.data[k] is None]
    if null:
        view.faults.add(null[0], "text or messages", None)
    return Prompt("prompt", None, bool(null))


def system(view: View) -> Messages:
    """The message of a `system` field, or none."""
    value = view.get("system")
    if value is not None and not isinstance(value, str):
        view.faults.add("system", "text", value)
    return ({"role": "system", "content": value},) if isinstance(value, str) and value else ()


def _history(view: View) -> Messages:
    value = view.get("history") or ()
    out: list[dict[str, str]] = []
    turns = value if isinstance(value, list | tuple) else [value]
    for i, turn in enumerate(turns):
        if isinstance(turn, list | tuple) and len(turn) == 2 and all(isinstance(t, str) for t in turn):
            out += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
        else:
            view.faults.add(f"history[{i}]", "a list of two texts, a user's and an assistant's", turn)
    return tuple(out)


def join(view: View, prompt: Prompt, candidates: Sequence[Candidate]) -> tuple[Content, list[Content]] | None:
    """The prompt and each response in its final form, or None and faults."""
    values = [c.value for c in candidates]
    talk = [is_message(v) or isinstance(v, list | tuple) for v in values]
    usable = [t or (isinstance(v, str) and v is not NOTHING) for v, t in zip(values, talk)]
    for c, fine in zip(candidates, usable):
        if not fine:
            view.faults.add(c.field, "text or messages", c.value)
    if not candidates or not all(usable):
        return None
    if candidates[0].field in CONVERSATIONS and not all(talk):
        return _after_messages(view, candidates)
    if not prompt.given or (isinstance(prompt.value, str) and all(talk) and _tells_prompt(values)):
        return _conversations(view, prompt, candidates) if all(talk) else _strings(view, candidates, any(talk))
    plain = isinstance(prompt.value, str)
    contents = [_content(c, plain, t, view.faults) for c, t in zip(candidates, talk)]
    if prompt.value is None:
        return None
    if not isinstance(prompt.value, str):
        view.notes.append("conversational")
    elif view.notes and view.notes[0] == "preference":
        view.notes.append("standard")
    return None if any(c is None for c in contents) else (prompt.value, [c for c in contents if c is not None])


def alone(view: View, prompt: Prompt) -> tuple[Content, list[Content]] | None:
    """A prompt without responses, or None and a fault."""
    if not prompt.given:
        view.faults.add("prompt", "text or messages", NOTHING)
    return None if prompt.value is None else (prompt.value, [])


def _tells_prompt(values: Sequence[object]) -> bool:
    """Whether every message list begins before the response, as in ultrafeedback_binarized."""
    firsts = [v[0] if isinstance(v, list | tuple) and v else v for v in values]
    return all(isinstance(m, dict) and m.get("role", m.get("from")) not in ("assistant", "gpt") for m in firsts)


def _content(c: Candidate, plain: bool, talk: bool, faults: Faults) -> Content | None:
    if plain and talk:
        faults.add(c.field, "text, as the prompt is text", c.value)
        return None
    if talk:
        response = messages(c.value, c.field, faults)
        if response:
            check_response(response, c.field, faults)
        return response
    content = c.value if c.token_ids else text(c.value, c.field, faults)  # a sampler may say nothing
    return content if plain or content is None else ({"role": "assistant", "content": content},)


def _after_messages(view: View, candidates: Sequence[Candidate]) -> tuple[Content, list[Content]] | None:
    """ms-swift: the last assistant turn of `messages` is the first response, the others stand beside it as text."""
    whole = messages(candidates[0].value, candidates[0].field, view.faults)
    rest = [_content(c, False, not isinstance(c.value, str), view.faults) for c in candidates[1:]]
    if whole is None or any(r is None for r in rest):
        return None
    return _split(view, candidates[:1], [whole], [r for r in rest if r is not None])


def _conversations(view: View, prompt: Prompt, candidates: Sequence[Candidate]) -> tuple[Content, list[Content]] | None:
    """Full conversations: the messages that all share are the prompt."""
    whole = [messages(c.value, c.field, view.faults) for c in candidates]
    if any(w is None for w in whole):
        return None
    if len(candidates) > 1:
        view.notes.append("implicit prompt")
    out = _split(view, candidates, [w for w in whole if w is not None], [])
    if out and isinstance(prompt.value, str) and not _says(out[0], prompt.value):
        view.faults.add(prompt.field, "the text of a message that all conversations begin with", prompt.value)
    return out


def _says(conversation: Content, prompt: str) -> bool:
    said = [m.get("content") for m in conversation if not isinstance(m, str)]
    return any(isinstance(s, str) and s.strip() == prompt.strip() for s in said)


def _split(
    view: View, candidates: Sequence[Candidate], whole: Sequence[Messages], rest: list[Content]
) -> tuple[Content, list[Content]] | None:
    n = common_prompt(whole)
    if not n:
        names = " and ".join(c.field for c in candidates[:2])
        view.faults.add("prompt", f"a prompt, or first messages that {names} share", NOTHING)
        return None
    for c, w in zip(candidates, whole):
        check_response(w[n:], c.field, view.faults)
    prompt = whole[0][:n]
    if prompt[0]["role"] != "system":
        prompt = (*system(view), *prompt)
    return prompt, [*(w[n:] for w in whole), *rest]


def _strings(view: View, candidates: Sequence[Candidate], mixed: bool) -> tuple[Content, list[Content]] | None:
    """Plain strings that hold the prompt too, split at the declared separator or by HH-RLHF's pattern."""
    faults, separator = view.faults, view.source.separator
    if mixed:
        faults.add(candidates[0].field, "all responses as text or all as messages", Say("a mixture"))
        return None
    split = split_strings([c.value for c in candidates], separator)
    if split is None:
        where = f"the separator {separator!r} in a shared beginning" if separator else "a prompt field"
        hint = "" if separator else " (or `separator` in the recipe's source, which ends the prompt in plain strings)"
        faults.add("prompt", where + hint, NOTHING)
        return None
    view.notes.append("split at the separator" if separator else "HH-RLHF strings")
    checked = [text(value, c.field, faults) for value, c in zip(split[1], candidates)]
    return None if any(c is None for c in checked) else (split[0], [c for c in checked if c is not None])
