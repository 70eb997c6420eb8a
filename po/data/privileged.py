"""The prompt that knows more: what a row's `privileged_prompt` says, in the form of its prompt."""

from __future__ import annotations

from po.data.messages import check_prompt, messages, text
from po.data.prompts import Content, Prompt, system
from po.data.view import View

FIELD = "privileged_prompt"


def read_privileged(view: View, prompt: Prompt, final: Content) -> Content | None:
    """Text where the prompt is text, messages where it is messages; text in place of the last message where a text
    prompt became a conversation. `final`: the row's prompt as it is used."""
    value = view.get(FIELD) if view.wanted.privileged else None
    if value is None:
        return None
    if isinstance(value, str):
        if isinstance(final, str):
            return text(value, FIELD, view.faults)
        if not isinstance(view.data.get(prompt.field), str):
            view.faults.add(FIELD, "messages, as the prompt is", value)
            return None
        said = text(value, FIELD, view.faults)
        return None if said is None else (*final[:-1], {**final[-1], "content": said})
    if isinstance(final, str):
        view.faults.add(FIELD, "text, as the prompt is", value)
        return None
    conversation = messages(value, FIELD, view.faults)
    if conversation and conversation[0]["role"] != "system":
        conversation = (*system(view), *conversation)
    if conversation:
        check_prompt(conversation, FIELD, view.faults)
    return conversation
