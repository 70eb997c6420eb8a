"""Text and messages: ShareGPT names translated, contents checked, implicit prompts split off."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from po.data.report import NOTHING, Faults, Say
from po.data.rows import Message
from po.errors import suggest

ROLES = ("system", "developer", "user", "assistant", "tool")
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"  # HH-RLHF
_SHAREGPT = {"human": "user", "gpt": "assistant", "observation": "tool", "function_response": "tool"}
Messages = tuple[Message, ...]


def is_message(value: object) -> bool:
    """Whether a value looks like one message, in either spelling."""
    return isinstance(value, dict) and ("role" in value or "from" in value)


def text(value: object, field: str, faults: Faults) -> str | None:
    """A non-empty string that can be written as UTF-8, or None and a fault."""
    if not isinstance(value, str):
        faults.add(field, "text", value)
        return None
    if not value.strip():
        faults.add(field, "text that is not empty", value)
        return None
    try:
        value.encode()
    except UnicodeEncodeError as e:
        faults.add(field, "valid Unicode", Say(f"a lone surrogate {value[e.start]!r} at character {e.start + 1}"))
        return None
    return value


def messages(value: object, field: str, faults: Faults) -> Messages | None:
    """A list of messages, or a single one, with HF's keys; None and faults where something is wrong."""
    if is_message(value):
        value = [value]
    if not isinstance(value, list | tuple):
        faults.add(field, "a list of messages", value)
        return None
    if not value:
        faults.add(field, "at least one message", value)
        return None
    out = [_message(m, f"{field}[{i}]", faults) for i, m in enumerate(value)]
    return None if any(m is None for m in out) else tuple(m for m in out if m is not None)


def _message(value: object, field: str, faults: Faults) -> Message | None:
    if not isinstance(value, dict):
        faults.add(field, "a message with role and content", value)
        return None
    message = {k: v for k, v in value.items() if v is not None}
    if "from" in message and "role" not in message:
        sharegpt = _from_sharegpt(message, field, faults)
        if sharegpt is None:
            return None
        message = sharegpt
    role = message.get("role", NOTHING)
    if role not in ROLES:
        near = suggest(role, ROLES) if isinstance(role, str) and role is not NOTHING else ""
        faults.add(f"{field}.role", f"one of {', '.join(ROLES)}", Say(f"{role!r}.{near}") if near else role)
        return None
    if isinstance(message.get("content"), list):
        message["content"] = _parts(message["content"], f"{field}.content", faults)
        if message["content"] is None:
            return None
    if "content" not in message and not message.get("tool_calls"):
        faults.add(f"{field}.content", "text, or tool_calls", NOTHING)
        return None
    return message if _fine(message, field, faults) else None


def _fine(message: dict[str, Any], field: str, faults: Faults) -> bool:
    """Content is text; only a tool's answer, a system prompt or a message with tool calls may be empty."""
    content = message.setdefault("content", "")
    if content == "" and (message.get("tool_calls") or message["role"] in ("tool", "system", "developer")):
        return True
    return text(content, f"{field}.content", faults) is not None


def _parts(parts: list[Any], field: str, faults: Faults) -> str | None:
    out = []
    for i, part in enumerate(parts):
        if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
            out.append(part["text"])
        else:
            kind = part.get("type") if isinstance(part, dict) else None
            faults.add(f"{field}[{i}]", "a part of type 'text'", Say(f"type {kind!r}") if kind else part)
            return None
    return "".join(out)


def _from_sharegpt(message: dict[str, Any], field: str, faults: Faults) -> dict[str, Any] | None:
    who, value = message.pop("from"), message.pop("value", None)
    if who != "function_call":
        return {**message, "role": _SHAREGPT.get(who, who), **({} if value is None else {"content": value})}
    try:
        calls = json.loads(value) if isinstance(value, str) else value
        calls = calls if isinstance(calls, list) else [calls]
        return {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": _call(c)} for c in calls],
        }
    except (ValueError, TypeError, KeyError):
        faults.add(f"{field}.value", "a JSON object with name and arguments", value)
        return None


def _call(call: dict[str, Any]) -> dict[str, Any]:
    return {"name": call["name"], "arguments": call["arguments"]}


def check_prompt(prompt: Messages, field: str, faults: Faults) -> None:
    """The last message of a prompt is not the assistant's: a response could not follow it."""
    if prompt[-1]["role"] == "assistant":
        faults.add(
            f"{field}[{len(prompt) - 1}].role", "the prompt's last message from user, tool or system", "assistant"
        )


def check_response(response: Messages, field: str, faults: Faults) -> None:
    """A response begins and ends with the assistant; tool results and user turns may lie between."""
    for i in dict.fromkeys((0, len(response) - 1)):
        if response[i]["role"] != "assistant":
            faults.add(f"{field}[{i}].role", "'assistant' at the start and end of a response", response[i]["role"])


def common_prompt(conversations: Sequence[Messages]) -> int:
    """How many first messages of full conversations are their prompt: shared, and not ending with the assistant."""
    n = 0
    for column in zip(*conversations):
        if any(m != column[0] for m in column):
            break
        n += 1
    n = min([n, *(len(c) - 1 for c in conversations)])
    while n and conversations[0][n - 1]["role"] == "assistant":
        n -= 1
    return n


def split_strings(full: Sequence[str], separator: str | None) -> tuple[str, list[str]] | None:
    """Prompt and responses of strings that hold both: the longest shared prefix that ends with the separator.

    Without a separator only HH-RLHF's own pattern is recognised; a shared prefix of characters is never a prompt
    ("The sky is blue", "The sky is black" share "The sky is bl").
    """
    if separator is None:
        if not all(s.lstrip().startswith(HUMAN.strip()) and ASSISTANT in s for s in full):
            return None
        separator = ASSISTANT
    end = full[0].rfind(separator)
    while end >= 0:
        prompt = full[0][: end + len(separator)]
        if all(s.startswith(prompt) for s in full):
            return prompt, [s[len(prompt) :] for s in full]
        end = full[0].rfind(separator, 0, end + len(separator) - 1)
    return None
