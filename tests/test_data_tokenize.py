"""Token ids are what the model sees: boundary in token space, BOS and EOS once and only where they belong."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from data_support import (
    CHATML,
    LLAMA,
    NO_STOP,
    SHARED,
    STORIES,
    TOOLS,
    assistant,
    row,
    settled,
    tokenizer,
    user,
)
from transformers import AutoTokenizer

from po.data.show import show
from po.data.tokenize import Coded, Encoder, RowFaultError
from po.errors import UserError

PAIR = {"prompt": "Q: x\nA:", "chosen": " yes", "rejected": " no"}
TALK = {"prompt": [user("q")], "chosen": "yes", "rejected": "no"}
BOS, EOS, IM_END = 1, 2, 4


def coded(data: dict[str, Any], tok: Any) -> Coded:
    return Encoder(tok)(row(data))


def text(tok: Any, ids: tuple[int, ...]) -> str:
    return str(tok.decode(list(ids)))


@pytest.mark.parametrize("bos", [True, False])
def test_plain_text_has_the_tokenizers_own_bos_once_and_eos_once_after_each_response(bos: bool) -> None:
    tok = tokenizer(bos=bos)
    got = coded(PAIR, tok)
    assert list(got.prompt_ids) == tok(PAIR["prompt"])["input_ids"]
    assert got.prompt_ids.count(BOS) == bos
    for ids, side in zip(got.response_ids, ("chosen", "rejected")):
        assert [*got.prompt_ids, *ids] == [*tok(PAIR["prompt"] + PAIR[side])["input_ids"], EOS]
        assert ids.count(EOS) == 1
    assert got.merged == ""


def test_specials_that_the_text_already_has_are_not_doubled() -> None:
    tok = tokenizer()
    same = coded({"prompt": "<s>" + PAIR["prompt"], "chosen": " yes</s>", "rejected": " no"}, tok)
    assert same == coded(PAIR, tok)


def test_a_token_across_the_boundary_is_scored_and_named() -> None:
    tok = tokenizer(merges=[(":", "Ġ"), (":Ġ", "y")])
    got = coded(PAIR, tok)
    assert tok.convert_ids_to_tokens([r[0] for r in got.response_ids]) == [":Ġy", ":Ġ"]
    assert got.merged == ":"
    for ids, side in zip(got.response_ids, ("chosen", "rejected")):
        assert [*got.prompt_ids, *ids] == [*tok(PAIR["prompt"] + PAIR[side])["input_ids"], EOS]
    assert settled(PAIR, tok).lines == {"boundary": "t.jsonl:1: ':'"}


def test_nothing_before_the_response_is_a_bad_row() -> None:
    tok = tokenizer(bos=False, merges=[("a", "b")])
    out = settled({"prompt": "a", "chosen": "b", "rejected": "c"}, tok)
    assert (out.fate, str(out.problem)) == (
        "bad",
        "t.jsonl:1: prompt: expected at least one token before the response, got none",
    )


def test_a_conversation_is_exactly_what_the_template_renders() -> None:
    tok = tokenizer(CHATML, eos="<|im_end|>")
    got = coded(TALK, tok)
    assert text(tok, got.prompt_ids) == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    for ids, answer in zip(got.response_ids, ("yes", "no")):
        whole = tok.apply_chat_template([user("q"), assistant(answer)], return_dict=False)
        assert [*got.prompt_ids, *ids] == whole
        assert ids.count(IM_END) == 1
    assert (got.appended, BOS in got.prompt_ids) == (0, False)
    assert settled(TALK, tok).counts["responses_stop"] == 2  # the line break after <|im_end|> does not hide it


def test_a_turn_that_ends_with_a_special_token_other_than_eos_needs_no_eos() -> None:
    got = coded(TALK, tokenizer(CHATML, eos="</s>"))
    assert (got.appended, [EOS in ids for ids in got.response_ids]) == (0, [False, False])


def test_a_template_with_bos_and_eos_gives_each_once() -> None:
    tok = tokenizer(LLAMA)
    got = coded(TALK, tok)
    assert [(*got.prompt_ids, *ids).count(BOS) for ids in got.response_ids] == [1, 1]
    assert [ids.count(EOS) for ids in got.response_ids] == [1, 1]
    assert text(tok, got.prompt_ids) == "<s>[INST] q [/INST]"


def test_eos_is_added_once_where_the_template_never_stops_and_that_is_counted() -> None:
    tok = tokenizer(NO_STOP)
    out = settled(TALK, tok)
    assert out.example is not None
    assert [text(tok, ids) for ids in out.example.response_ids] == ["assistant: yes\n</s>", "assistant: no\n</s>"]
    assert out.counts["responses_eos_added"] == 2


def test_tools_calls_and_template_arguments_reach_the_template() -> None:
    tok = tokenizer(TOOLS + CHATML)
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "f"}}]}
    data = {
        "prompt": [user("q")],
        "chosen": [call, {"role": "tool", "content": "4"}, assistant("four")],
        "rejected": "no",
        "tools": [{"name": "f"}],
        "chat_template_kwargs": {"think": True},
    }
    got = coded(data, tok)
    assert text(tok, got.prompt_ids) == (
        '<|im_start|>system\n[{"name": "f"}]<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n'
    )
    assert got.merged == "<think>\n"  # the template opens a thought that these responses do not have
    assert text(tok, got.response_ids[0]) == (
        '[{"type": "function", "function": {"name": "f"}}]<|im_end|>\n<|im_start|>tool\n4<|im_end|>\n'
        "<|im_start|>assistant\nfour<|im_end|>\n"
    )


def test_a_template_that_rewrites_the_prompt_is_a_bad_row() -> None:
    rewriting = "{% for m in messages %}{% if loop.length == 1 %}<{% endif %}{{ m.content }}</s>{% endfor %}"
    with pytest.raises(RowFaultError) as e:
        coded(TALK, tokenizer(rewriting))
    assert str(e.value.problem) == (
        "t.jsonl:1: prompt: expected a chat template that renders the prompt the same with and without a response, "
        "got '<q</s>' without and 'q</s>yes</s>' with responses[0]"
    )


def test_what_the_template_refuses_is_a_bad_row() -> None:
    out = settled({**TALK, "system": "s"}, tokenizer(LLAMA))
    assert str(out.problem) == (
        "t.jsonl:1: messages: expected a conversation that the chat template accepts, got TemplateError: no system role"
    )


def test_a_tokenizer_that_cannot_do_it_is_the_users_to_change() -> None:
    with pytest.raises(UserError) as e:
        coded(TALK, tokenizer())
    assert str(e.value) == (
        "t.jsonl:1: the prompt is a conversation, but the tokenizer has no chat template. Name a Jinja file in "
        "model.chat_template, or write prompt and responses as plain text"
    )
    tok = tokenizer()
    tok.eos_token = None
    with pytest.raises(UserError, match=r"^t.jsonl:1: the tokenizer has no eos_token, so a plain text response cannot"):
        coded(PAIR, tok)


def test_the_samplers_logps_must_be_one_per_token() -> None:
    def data(n: int) -> dict[str, Any]:
        made = [{"text": t, "reward": r, "logps": [-1.0] * k} for t, r, k in (("ab", 1, 3), ("c", 2, n))]
        return {"prompt": "q", "responses": made}

    out = settled(data(2), tokenizer())
    assert out.example is not None
    assert out.example.logps == ((-1.0,) * 3, (-1.0,) * 2)
    assert str(settled(data(1), tokenizer()).problem) == (
        "t.jsonl:1: responses[1].logps: expected 2 numbers, one per token with its end token, got 1"
    )


def test_show_marks_what_is_scored() -> None:
    tok = tokenizer()
    example = settled({"id": "r7", "prompt": "ab", "responses": ["c\n", "d"], "rewards": [0.5, 1]}, tok).example
    assert example is not None
    assert show(example, tok) == (
        "t.jsonl:1 (id r7)\nprompt, 3 tokens, not scored:\n  <s>|a|b\n"
        "response 0, 3 tokens, scored, reward 0.5:\n  c|\\n|</s>\nresponse 1, 2 tokens, scored, reward 1:\n  d|</s>"
    )


FAMILIES = ["gemma", "gemma3", "llama3", "llama3_2", "phi3", "qwen2_5", "qwen3", "qwen3_training", "lfm2", "glm4moe",
            "gptoss", "deepseekv3", "cohere", "nemotron_3_nano"]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_real_templates_are_rendered_as_they_are(family: str) -> None:
    """The templates of published models, which TRL ships as files: ids = the template's ids, and EOS only as told."""
    trl = importlib.util.find_spec("trl")
    if trl is None or trl.origin is None:
        pytest.skip("needs trl's template files")
    tok = tokenizer((Path(trl.origin).parent / "chat_templates" / f"{family}.jinja").read_text())
    talk = [user("hello"), assistant("hi"), user("really?")]
    out = settled({"prompt": talk, "chosen": "yes sir", "rejected": "no"}, tok)
    assert out.example is not None, out.problem
    added = out.counts["responses_eos_added"] // 2
    for ids, answer in zip(out.example.response_ids, ("yes sir", "no")):
        whole = tok.apply_chat_template([*talk, assistant(answer)], tokenize=False)
        assert [*out.example.prompt_ids, *ids] == tok(whole, add_special_tokens=False)["input_ids"] + [EOS] * added
        assert answer in text(tok, ids)
        assert "really" not in text(tok, ids)


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/models")
def test_a_real_llama_tokenizer() -> None:
    tok = AutoTokenizer.from_pretrained(STORIES, add_bos_token=True)
    got = coded({"prompt": "Once upon a time", "chosen": " there was a cat.", "rejected": "\nLily ran"}, tok)
    for ids, rest in zip(got.response_ids, (" there was a cat.", "\nLily ran")):
        assert [*got.prompt_ids, *ids] == [*tok("Once upon a time" + rest)["input_ids"], tok.eos_token_id]
    assert got.prompt_ids[0] == tok.bos_token_id
