"""Sampling with the policy itself, by transformers' `generate`.

A prompt is computed once for all its samples: `generate` starts from copies of its keys and values. Models whose cache
cannot be copied row by row (recurrent layers, or no cache at all) compute it once per sample.

generate's own settings and those that a model ships with (`generation_config.json`: top_p, repetition penalties, ...)
play no part: `Sampling` alone says how tokens are drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import wraps
from inspect import signature
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from po.errors import UserError
from po.rollout.sampler import Sampled, Sampling, counts


class HFSampler:
    """A `Sampler` that generates with a transformers model, which is left as it was found.

    model: what the trainer holds, in DDP, DeepSpeed or PEFT. Under ZeRO-3 it must be DeepSpeed's engine (`update` takes
    it once there is one): all parameters are gathered on every rank meanwhile, so that every rank calls `sample` the
    same number of times, with or without prompts. adapter False: sample from the base, PEFT's adapter off.
    autocast: the dtype of the Trainer's mixed precision, if on. sequences_per_call: how many are generated at once;
    a prompt whose samples fall into two calls is computed in each.
    """

    def __init__(
        self,
        model: nn.Module,
        sampling: Sampling,
        stop_ids: Sequence[int],
        pad_id: int,
        device: torch.device | str,
        *,
        sequences_per_call: int = 64,
        adapter: bool = True,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.model, self.sampling, self.adapter, self.autocast = model, sampling, adapter, autocast
        self.stop_ids, self.pad_id = frozenset(stop_ids), pad_id
        self.device, self.sequences_per_call = torch.device(device), sequences_per_call

    def update(self, model: nn.Module) -> None:
        """Sample from `model` from now on; its weights are read when sampling."""
        self.model = model

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[tuple[int, ...]], n: int | Sequence[int], seeds: Sequence[int]
    ) -> list[list[Sampled]]:
        """Every sample draws from a generator of its own; the global random state is left as it was."""
        assert len(seeds) == len(prompts), f"{len(seeds)} seeds for {len(prompts)} prompts"
        rows = [(i, j) for i, k in enumerate(counts(prompts, n)) for j in range(k)]
        rows.sort(key=lambda row: len(prompts[row[0]]))
        out: list[list[Sampled]] = [[] for _ in prompts]
        with ExitStack() as stack:
            net = stack.enter_context(self._ready())
            for call in _calls(rows, prompts, self.sequences_per_call, one_length=not copies(net)):
                noise = [self._noise(seeds[i], j) for i, j in call]
                for (i, _), sampled in zip(call, self._generate(net, [prompts[i] for i, _ in call], noise)):
                    out[i].append(sampled)
        return out

    @contextmanager
    def _ready(self) -> Iterator[Any]:
        """The transformers model, whole and set to generate."""
        with ExitStack() as stack:
            stack.enter_context(_gathered(self.model))
            if not self.adapter:
                stack.enter_context(adapted(self.model).disable_adapter())
            net = bare(self.model)
            stack.enter_context(_evaluating(net))
            stack.enter_context(_plain_settings(net, self._settings()))
            if self.autocast is not None:
                stack.enter_context(torch.autocast(self.device.type, self.autocast))
            yield net

    def _noise(self, seed: int, sample: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed((seed * 1_000_003 + sample) % 2**63)

    def _settings(self) -> GenerationConfig:
        """Always the likeliest token: what is drawn, `_Noise` decides."""
        return GenerationConfig(
            do_sample=False,
            max_new_tokens=self.sampling.max_tokens,
            eos_token_id=sorted(self.stop_ids) or None,
            pad_token_id=self.pad_id,
        )

    def _processors(self, record: _Record, noise: list[torch.Generator]) -> LogitsProcessorList:
        s, found = self.sampling, LogitsProcessorList([record])
        if s.temperature == 0:
            return found
        if s.temperature != 1:
            found.append(TemperatureLogitsWarper(s.temperature))
        if s.top_k:
            found.append(TopKLogitsWarper(s.top_k))
        if s.top_p < 1:
            found.append(TopPLogitsWarper(s.top_p))
        found.append(_Noise(noise))
        return found

    def _generate(self, net: Any, prompts: list[tuple[int, ...]], noise: list[torch.Generator]) -> list[Sampled]:
        """One sample of each prompt, each with a generator; equal prompts stand together."""
        distinct = [p for p, _ in groupby(prompts)]
        of_row = torch.tensor([k for k, (_, same) in enumerate(groupby(prompts)) for _ in same], device=self.device)
        width = len(prompts[-1])
        padded = [[self.pad_id] * (width - len(p)) + list(p) for p in distinct]
        ids_NL = torch.tensor(padded, device=self.device)
        mask_NL = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in distinct], device=self.device)
        start = {}
        if width > 1 and copies(net):
            start["past_key_values"] = _computed(net, ids_NL[:, :-1], mask_NL[:, :-1])
            start["past_key_values"].batch_select_indices(of_row)
        record = _Record(self.sampling.logp_temperature)
        out_BL = net.generate(
            input_ids=ids_NL[of_row],
            attention_mask=mask_NL[of_row],
            generation_config=net.generation_config,
            logits_processor=self._processors(record, noise),
            synced_gpus=False,  # ZeRO-3's parameters are gathered
            **start,
        )
        drawn_BT = out_BL[:, width:]
        return [self._cut(*row) for row in zip(drawn_BT.tolist(), record.logps(drawn_BT).tolist())]

    def _cut(self, ids: list[int], logps: list[float]) -> Sampled:
        end = next((t for t, token in enumerate(ids) if token in self.stop_ids), None)
        size = len(ids) if end is None else end + 1
        return Sampled(tuple(ids[:size]), tuple(logps[:size]), end is not None)


class _Record(LogitsProcessor):
    """Log-probs of chosen tokens, each read when the next step shows what was chosen: one step's distribution at a time
    is kept. It stands before temperature, top_k and top_p, so that these are whole distributions."""

    def __init__(self, temperature: float) -> None:
        self._temperature = temperature
        self._chosen: list[Tensor] = []
        self._last_BV: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._last_BV is not None:
            self._read(input_ids[:, -1])
        self._last_BV = (scores.float() / self._temperature).log_softmax(-1)
        return scores

    def _read(self, chosen_B: Tensor) -> None:
        assert self._last_BV is not None
        self._chosen.append(self._last_BV.gather(-1, chosen_B[:, None])[:, 0])

    def logps(self, drawn_BT: Tensor) -> Tensor:
        """(B, T), of what generate returned: it looks late whether all have ended, and takes later steps back."""
        T = drawn_BT.shape[1]
        if len(self._chosen) < T:
            self._read(drawn_BT[:, -1])
        return torch.stack(self._chosen[:T], 1)


class _Noise(LogitsProcessor):
    """Gumbel noise, so that the likeliest token is a draw from the softmax; of a generator for each row, so that a
    sample depends on nothing else in its call."""

    def __init__(self, generators: list[torch.Generator]) -> None:
        self._generators = generators

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows = [
            torch.empty_like(s, dtype=torch.float32).exponential_(generator=g) for s, g in zip(scores, self._generators)
        ]
        return scores.float() - torch.stack(rows).clamp_min(1e-30).log()


def bare(model: Any) -> Any:
    """The transformers model below DDP, DeepSpeed and PEFT. PEFT's layers stay in it, and in force."""
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def adapted(model: Any) -> Any:
    """The PEFT model below DDP and DeepSpeed."""
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    assert hasattr(model, "disable_adapter"), f"{type(model).__name__} has no adapter to switch off"
    return model


def copies(net: Any) -> bool:
    """Whether generation can start from copies of a prompt's keys and values."""
    if getattr(net, "_is_stateful", False) or not net._supports_default_dynamic_cache():
        return False
    layers = DynamicCache(config=net.config.get_text_config(decoder=True)).layers
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def _computed(net: Any, ids_NL: Tensor, mask_NL: Tensor) -> DynamicCache:
    """The keys and values of left-padded prompts."""
    accepts = signature(net.forward).parameters
    call: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in accepts else {}
    if "position_ids" in accepts:
        call["position_ids"] = (mask_NL.cumsum(-1) - 1).clamp_min(0)
    cache = DynamicCache(config=net.config.get_text_config(decoder=True))
    net(input_ids=ids_NL, attention_mask=mask_NL, past_key_values=cache, use_cache=True, **call)
    return cache


def _calls(
    rows: Sequence[tuple[int, int]], prompts: Sequence[tuple[int, ...]], most: int, one_length: bool
) -> Iterator[Sequence[tuple[int, int]]]:
    """At most so many rows at a time; one_length: of prompts of one length, as recurrent layers see padding."""
    for _, same in groupby(rows, lambda row: len(prompts[row[0]]) if one_length else 0):
        together = list(same)
        for start in range(0, len(together), most):
            yield together[start : start + most]


@contextmanager
def _evaluating(net: nn.Module) -> Iterator[None]:
    """No dropout and no gradient checkpointing (which would refuse the cache), in any module; each as it was after."""
    training = [(m, m.training) for m in net.modules()]
    checkpointing = [m for m in net.modules() if getattr(m, "gradient_checkpointing", False)]
    net.eval()
    for m in checkpointing:
        m.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for m, mode in training:
            m.training = mode
        for m in checkpointing:
            m.gradient_checkpointing = True  # type: ignore[assignment]


@contextmanager
def _plain_settings(net: Any, settings: GenerationConfig) -> Iterator[None]:
    """generate with these settings alone, and with a forward whose signature it can read: generate asks it whether to
    pass positions (without which left-padded prompts are wrong) and po's scoring forward does not say."""
    shipped, found = net.generation_config, net.__dict__.get("forward")
    net.generation_config = settings
    if found is not None:

        @wraps(type(net).forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return found(*args, **kwargs)

        net.forward = forward
    try:
        yield
    finally:
        net.generation_config = shipped
        if found is not None:
            net.forward = found


def _gathered(model: Any) -> Any:
    """Under ZeRO-3 the whole model on every rank, DeepSpeed's hooks off."""
    if not any(hasattr(p, "ds_id") for p in model.parameters()):
        return nullcontext()
    if not hasattr(model, "optimizer"):
        raise UserError(
            "sampling under ZeRO-3: got a model whose parameters DeepSpeed has partitioned, without its engine; "
            "expected the engine (`Trainer.model_wrapped`). Sample after the Trainer has wrapped the model"
        )
    from deepspeed.runtime.zero.stage3 import unwrap_model_for_generation

    return unwrap_model_for_generation(model)
