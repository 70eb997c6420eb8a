"""Small real tokenizers, and rows in files, for the tests of po.data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from po.data.formats import convert
from po.data.overlong import Limits, Outcome, settle
from po.data.read import Record
from po.data.rows import Row
from po.data.tokenize import Encoder
from po.data.wanted import NOTHING_MORE, Wanted
from po.spec import Source

SHARED = Path(__file__).parents[1].parent / "shared"
ALPACA = SHARED / "data" / "alpaca_sets.jsonl.gz"
GSM8K = SHARED / "data" / "gsm8k_solutions.jsonl.gz"
STORIES = SHARED / "models" / "stories260k"

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if think %}<think>\n{% endif %}{% endif %}"
)
TOOLS = "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
NO_STOP = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'system' %}{{ raise_exception('no system role') }}"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
SPECIALS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def tokenizer(
    template: str | None = None, bos: bool = True, merges: list[tuple[str, str]] | None = None, eos: str = "</s>"
) -> Any:
    """A byte-level BPE of 256 bytes, some merges and SPECIALS; with `bos` it puts <s> before every text."""
    merges = merges or []
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {t: i for i, t in enumerate([*SPECIALS, *alphabet, *(a + b for a, b in merges)])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=None))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIALS)
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token=eos, unk_token="<unk>", chat_template=template
    )


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def row(data: dict[str, Any], wanted: Wanted = NOTHING_MORE, **source: Any) -> Row:
    """One record as a Row; fails where it has problems."""
    done = convert(Record("t.jsonl:1", data), Source("t.jsonl", **source), wanted)
    assert done.row is not None, [str(p) for p in done.problems]
    return done.row


def problems(data: dict[str, Any], wanted: Wanted = NOTHING_MORE, **source: Any) -> list[str]:
    """What is wrong with one record."""
    return [str(p) for p in convert(Record("t.jsonl:1", data), Source("t.jsonl", **source), wanted).problems]


def settled(
    data: dict[str, Any],
    tok: Any,
    max_length: int = 1000,
    prompt: int | None = None,
    overlong: Any = "drop",
    wanted: Wanted = NOTHING_MORE,
) -> Outcome:
    """One record through tokens and the length policy."""
    return settle(row(data, wanted), Encoder(tok), Limits(max_length, prompt, overlong))


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path
