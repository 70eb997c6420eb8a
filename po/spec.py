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
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
ReferenceKind = Literal["cached", "frozen", "adapter_off"]
ZeroVariance = Literal["keep", "drop", "refill"]
Correction = Literal["none", "token", "sequence"]


@dataclass(frozen=True)
class ModelSpec:
    name_or_path: str  # a folder or a hub name
    revision: str | None = None
    dtype: Dtype = "auto"  # auto: as the checkpoint says
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
class RewardSpec:
    """One reward; exactly one of function, verifier, model and url says what computes it."""

    function: str | None = None  # rewards.py:name or package.module:name, called as TRL calls reward functions
    verifier: str | None = None  # a built-in one by name; docs/rewards.md lists them
    model: str | None = None  # a reward model, a folder or a hub name
    url: str | None = None  # an HTTP endpoint
    name: str | None = None  # in metrics and columns; None: the function's, verifier's or model's
    weight: float = 1.0
    timeout: Annotated[float, Gt(0)] = 60.0  # seconds per call
    options: Mapping[str, Any] = field(default_factory=dict)  # what the reward itself takes


@dataclass(frozen=True)
class RolloutSpec:
    rewards: tuple[RewardSpec, ...] = ()  # none: for heads that read neither rewards nor labels
    num_generations: Annotated[int, Ge(1)] = 8  # samples of each prompt
    max_completion_length: Annotated[int, Ge(1)] = 256  # tokens; prompts have the rest of data.max_length
    temperature: Annotated[float, Gt(0)] = 1.0  # log-probs in training are those of this temperature too
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    top_k: Annotated[int, Ge(0)] = 0  # 0: all tokens
    sample_from: Literal["prompt", "privileged"] = "prompt"  # privileged: the rows' privileged_prompt
    server: str | None = None  # a vLLM server's address; None: the policy generates in this process
    sequences_per_call: Annotated[int, Ge(1)] = 64  # sampled at once on a device
    steps_per_generation: Annotated[int, Ge(1)] = 1  # optimizer steps whose prompts are sampled at once
    num_iterations: Annotated[int, Ge(1)] = 1  # times that these steps are taken
    zero_variance: ZeroVariance = "keep"  # groups whose rewards are equal: count, do not count, or sample other prompts
    refill_budget: Annotated[float, Gt(0)] = 1.0  # with refill: further prompts, as a share of the round's
    from_reference: Annotated[int, Ge(0)] = 0  # how many of num_generations the reference writes
    gold: Literal["never", "all_failed"] = (
        "never"  # all_failed: the row's own response for a sample, where none has reward
    )
    own_responses: bool = False  # the row's own responses join the group, with their rewards or labels
    label_above: float | None = None  # samples with more reward are desirable, the others not; None: unlabelled
    consistency: tuple[str, str] | None = None  # rewards whose agreement on ranks is each row's column `consistency`
    correction: Correction = "none"  # truncated importance weights against the sampler's own log-probs
    correction_cap: Annotated[float, Gt(0)] = 2.0  # their largest value
    max_unscored: Annotated[float, Ge(0), Le(1)] = 0.0  # share of a round's samples that rewards may fail on


@dataclass(frozen=True)
class Recipe:
    model: ModelSpec
    data: DataSpec
    loss: tuple[Term, ...]
    output_dir: str
    lora: LoraSpec | None = None
    reference: ReferenceSpec = ReferenceSpec()
    rollout: RolloutSpec | None = None  # sample responses to the rows' prompts, and reward them
    train: Mapping[str, Any] = field(default_factory=dict)  # transformers.TrainingArguments by name, checked
    max_tokens_per_forward: Annotated[int, Ge(1)] | None = None  # split larger micro-batches; exact, one forward more
    deepspeed: str | Mapping[str, Any] | None = None  # zero0|1|2|3, zero2_offload, zero3_offload, a path, a mapping
    resume: bool = False
    seed: Annotated[int, Ge(0), Lt(2**32)] = 42
