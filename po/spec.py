"""What a recipe says, as frozen dataclasses: the nouns that `recipe` parses and everything else reads.

Names are Hugging Face's and TRL's where they have one. Every field's comment is its documentation in `po check --help`
and in the generated JSON schema.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt

from po.types import Head

PairRule = Literal["best_vs_worst", "best_vs_random", "adjacent", "all", "margin"]
Overlong = Literal["drop", "truncate_prompt", "truncate_response", "error"]
RankOrder = Literal["lower_is_better", "higher_is_better"]
ReferenceKind = Literal["cached", "frozen", "adapter_off"]


@dataclass(frozen=True)
class ModelSpec:
    name_or_path: str  # a folder or a hub name
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: as the checkpoint says
    tokenizer: str | None = None  # a folder or a hub name; None: the model's
    chat_template: str | None = None  # a Jinja file that replaces the tokenizer's template
    adapter: str | None = None  # an SFT adapter that the run continues
    load_in_4bit: bool = False  # QLoRA; needs the package bitsandbytes
    share_prefix: bool | Literal["auto"] = "auto"  # compute a prompt once for its responses
    trust_remote_code: bool = False


@dataclass(frozen=True)
class LoraSpec:
    r: Annotated[int, Ge(1)] = 16
    alpha: Annotated[float, Gt(0)] = 32.0
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    exclude_modules: tuple[str, ...] | None = None
    modules_to_save: tuple[str, ...] | None = None
    use_rslora: bool = False
    use_dora: bool = False


@dataclass(frozen=True)
class ReferenceSpec:
    source: str = "init"  # recipe key `from`: init | base | none | a path or hub name
    kind: ReferenceKind = "cached"
    cache_dir: str | None = None  # None: $PO_CACHE/reference, else ~/.cache/po/reference


@dataclass(frozen=True)
class Source:
    path: str  # a file, a glob, a folder saved by `datasets`, or a hub name
    name: str | None = None  # the hub dataset's configuration
    split: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)  # ours: theirs, e.g. {prompt: instruction}
    rank_order: RankOrder | None = None  # mandatory where rows carry ranks
    separator: str | None = None  # e.g. "\n\nAssistant:", splits prompt and response in plain strings
    limit: Annotated[int, Ge(1)] | None = None  # the first so many rows


@dataclass(frozen=True)
class DataSpec:
    train: tuple[Source, ...]
    eval: tuple[Source, ...] = ()
    max_length: Annotated[int, Ge(2)] = 2048  # prompt + response, tokens
    max_prompt_length: Annotated[int, Ge(1)] | None = None
    overlong: Overlong = "drop"
    pairing: PairRule = "best_vs_worst"  # how a pair head derives pairs from a set
    pairing_margin: Annotated[float, Gt(0)] | None = None  # with `margin`: the least reward difference
    max_bad: Annotated[float, Ge(0)] = 0.0  # bad rows the run may go on without: a share below 1, a count from 1 on
    max_dropped: Annotated[float, Ge(0), Le(1)] = 0.05  # share of rows that `overlong` may drop or cut
    num_proc: Annotated[int, Ge(1)] = 1
    cache_dir: str | None = None  # None: $PO_CACHE/data, else ~/.cache/po/data


@dataclass(frozen=True)
class Term:
    """One head with its weight in the sum that is the objective."""

    head: Head
    weight: Annotated[float, Gt(0)] = 1.0


@dataclass(frozen=True)
class Recipe:
    model: ModelSpec
    data: DataSpec
    loss: tuple[Term, ...]
    output_dir: str
    lora: LoraSpec | None = None
    reference: ReferenceSpec = ReferenceSpec()
    train: Mapping[str, Any] = field(default_factory=dict)  # transformers.TrainingArguments by name, checked
    max_tokens_per_forward: Annotated[int, Ge(1)] | None = None  # split larger micro-batches; exact, one forward more
    deepspeed: str | Mapping[str, Any] | None = None  # zero0|1|2|3, zero2_offload, zero3_offload, a path, a mapping
    resume: bool = False
    seed: Annotated[int, Ge(0), Lt(2**32)] = 42
