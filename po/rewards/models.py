"""Reward models: a classifier's score and the implicit reward of a DPO model (`ordinal` has the third kind).

They run in this process, on the trainer's device, a batch at a time, without gradient. Only safetensors are read and no
code of a model's folder is run. Prompt and completion are rendered by the reward model's own tokenizer and chat
template, as `po.data.tokenize` renders training rows. What does not fit into the model is not scored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from po.data.rows import Response, Row
from po.data.tokenize import Encoder, RowFaultError
from po.errors import UserError, out_of_memory
from po.forest import Padded, pad
from po.logprob import score
from po.policy import load_frozen, load_tokenizer, plainly
from po.rewards.cells import Call, Cell, Failure, cell, failed
from po.spec import Dtype, ModelSpec
from po.weights import locate, read_config, weight_files

Coded = tuple[tuple[int, ...], tuple[int, ...]]  # prompt ids, response ids


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """What all kinds share."""

    dtype: Dtype = "auto"
    batch_size: Annotated[int, Ge(1)] = 16  # completions at a time
    max_length: Annotated[int, Ge(1)] | None = None  # tokens; None: what the model's configuration says


@dataclass(frozen=True, kw_only=True)
class ClassifierOptions(Scoring):
    """Options of kind: classifier."""


@dataclass(frozen=True, kw_only=True)
class ImplicitOptions(Scoring):
    """Options of kind: implicit. Exactly one of reference and adapter says what the reference is."""

    beta: Annotated[float, Gt(0)] = 0.1
    reference: str | None = None  # a model folder or hub name
    adapter: str | None = None  # the model with this adapter is the policy, without it the reference


class Model:
    """A reward model: `rewards` of encoded completions; this class does the rest."""

    def __init__(self, name: str, options: Scoring, device: str, where: str) -> None:
        self._spec = ModelSpec(str(folder_of(name, where)), dtype=options.dtype)
        self._where, self._device = where, device
        self.batch_size = options.batch_size
        self.tokenizer = load_tokenizer(self._spec)
        self._encoder = Encoder(self.tokenizer)
        config = read_config(locate(name), where)
        self._longest = options.max_length or config.get("max_position_embeddings") or config.get("n_positions")

    def rewards(self, coded: Sequence[Coded]) -> list[float]:
        """One number each."""
        raise NotImplementedError

    def encode(self, prompt: Any, completion: Any) -> Coded:
        """Token ids of a completion behind its prompt."""
        said = completion if isinstance(completion, str) else tuple(completion)
        row = Row("completion", "completion", prompt if isinstance(prompt, str) else tuple(prompt), (Response(said),))
        coded = self._encoder(row)
        return coded.prompt_ids, coded.response_ids[0]

    @torch.no_grad()
    def __call__(self, call: Call) -> list[Cell]:
        """A cell for each completion, in order; long and short ones are batched apart."""
        found: list[Cell] = [None] * len(call)
        coded: dict[int, Coded] = {}
        for i, (prompt, completion) in enumerate(zip(call.prompts, call.completions, strict=True)):
            try:
                coded[i] = self.encode(prompt, completion)
                long = sum(map(len, coded[i]))
                if self._longest is not None and long > self._longest:
                    del coded[i]
                    found[i] = Failure("overlong", f"{long} tokens; the model takes {self._longest}")
            except RowFaultError as e:
                found[i] = Failure("raised", f"cannot be rendered: expected {e.problem.expected}, got {e.problem.got}")
        for batch in _batches(coded, self.batch_size):
            try:
                values: Sequence[Any] = self.rewards([coded[i] for i in batch])
            except Exception as e:
                if out_of_memory(e):
                    raise
                values = [failed(e)] * len(batch)
            for i, value in zip(batch, values, strict=True):
                found[i] = cell(value)
        return found

    def close(self) -> None:
        """Nothing to end."""


def _batches(coded: dict[int, Coded], size: int) -> Iterator[list[int]]:
    by_length = sorted(coded, key=lambda i: sum(map(len, coded[i])))
    for start in range(0, len(by_length), size):
        yield by_length[start : start + size]


def folder_of(name: str, where: str) -> Any:
    folder = locate(name, None, where)
    weight_files(folder, where)
    return folder


def right_padded(sequences: Sequence[Sequence[int]], pad_id: int, device: Any) -> tuple[Tensor, Tensor]:
    """Ids and mask, (N, L) each."""
    length = max(map(len, sequences))
    ids_NL = [[*s, *[pad_id] * (length - len(s))] for s in sequences]
    mask_NL = [[1] * len(s) + [0] * (length - len(s)) for s in sequences]
    return torch.tensor(ids_NL, device=device), torch.tensor(mask_NL, device=device)


def laid_out(coded: Sequence[Coded], device: Any) -> Padded:
    """One row per completion, on the device; completion n owns slot n."""
    stream = pad([(p, [r]) for p, r in coded], 1)
    return Padded(**{k: v.to(device) for k, v in vars(stream).items()})


def _vocabulary(net: Any) -> int:
    return int(net.config.get_text_config().vocab_size)


class Classifier(Model):
    """The one logit of a sequence classification model (a Bradley-Terry reward model and its like).

    A decoder reads the score at the last token that is not the padding token of its configuration. Where it names none,
    sequences go one at a time, since no padding could be told from text.
    """

    def __init__(self, name: str, options: ClassifierOptions, device: str, where: str) -> None:
        super().__init__(name, options, device, where)
        from transformers import AutoConfig, AutoModelForSequenceClassification

        folder = locate(name, None, where)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if config.num_labels != 1:
            raise UserError(
                f"{where}: {folder} has {config.num_labels} labels; expected a reward model with one (num_labels 1)"
            )
        with plainly():
            net, info = AutoModelForSequenceClassification.from_pretrained(
                folder,
                dtype="auto" if options.dtype == "auto" else getattr(torch, options.dtype),
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        if info["missing_keys"]:
            raise UserError(
                f"{where}: the weights in {folder} lack {min(info['missing_keys'])!r}, which would start at random; "
                "expected a reward model (sequence classification), not a language model"
            )
        self._net: Any = net.to(device).eval()
        self._pad = config.get_text_config().pad_token_id
        if self._pad is None:
            self.batch_size = 1

    def rewards(self, coded: Sequence[Coded]) -> list[float]:
        """The logit at each sequence's end."""
        ids_NL, mask_NL = right_padded([p + r for p, r in coded], self._pad or 0, self._device)
        logits_N1 = self._net(input_ids=ids_NL, attention_mask=mask_NL).logits
        return [float(x) for x in logits_N1[:, 0].float().tolist()]


class Implicit(Model):
    """beta x (log pi(y | x) - log ref(y | x)), summed over the response's tokens: the reward that DPO trains."""

    def __init__(self, name: str, options: ImplicitOptions, device: str, where: str) -> None:
        super().__init__(name, options, device, where)
        if (options.reference is None) == (options.adapter is None):
            raise UserError(
                f"{where}: a reward of kind implicit needs a reference: write options.reference (a model), or "
                "options.adapter (then the model without it is the reference), and not both"
            )
        self._beta = options.beta
        adapter = None if options.adapter is None else str(folder_of(options.adapter, f"{where}.options.adapter"))
        with plainly():
            spec = ModelSpec(self._spec.name_or_path, dtype=options.dtype, adapter=adapter)
            self._net: Any = load_frozen(spec).to(device)
            self._ref: Any = None
            if options.reference is not None:
                folder = str(folder_of(options.reference, f"{where}.options.reference"))
                self._ref = load_frozen(ModelSpec(folder, dtype=options.dtype)).to(device)
        if self._ref is not None and _vocabulary(self._ref) != _vocabulary(self._net):
            raise UserError(f"{where}: model and reference have different vocabularies; expected the same tokenizer")

    def rewards(self, coded: Sequence[Coded]) -> list[float]:
        """Sums of log-ratios."""
        stream = laid_out(coded, self._device)
        policy_T = score(self._net, stream).logp_T
        with self._net.disable_adapter() if self._ref is None else nullcontext():
            ref_T = score(self._net if self._ref is None else self._ref, stream).logp_T
        zero_N = torch.zeros(len(coded), dtype=policy_T.dtype, device=policy_T.device)
        return [float(x) for x in (self._beta * zero_N.index_add(0, stream.slot_T, policy_T - ref_T)).tolist()]
