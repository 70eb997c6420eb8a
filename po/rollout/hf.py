"""Sampling with the policy itself.

A prompt is computed once for all its samples, which start from copies of its keys and values (`decode`). Models whose
cache cannot be copied row by row (recurrent layers, or no cache at all) go through transformers' `generate` and compute
it once per sample.

generate's own settings and those that a model ships with (`generation_config.json`: top_p, repetition penalties, ...)
play no part: `Sampling` alone says how tokens are drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import wraps
from itertools import groupby
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessorList

from po.errors import UserError
from po.rollout.choose import Choose, Chosen
from po.rollout.decode import copies, decode
from po.rollout.sampler import Sampled, Sampling, counts
from po.unwrap import unwrapped


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
        """Always the likeliest token: what is drawn, `Chosen` decides."""
        return GenerationConfig(
            do_sample=False,
            max_new_tokens=self.sampling.max_tokens,
            eos_token_id=sorted(self.stop_ids) or None,
            pad_token_id=self.pad_id,
        )

    def _generate(self, net: Any, prompts: list[tuple[int, ...]], noise: list[torch.Generator]) -> list[Sampled]:
        """One sample of each prompt, each with a generator; equal prompts stand together."""
        distinct = [p for p, _ in groupby(prompts)]
        of_row = torch.tensor([k for k, (_, same) in enumerate(groupby(prompts)) for _ in same], device=self.device)
        width, choose = len(prompts[-1]), Choose(self.sampling, noise, self.device)
        padded = [[self.pad_id] * (width - len(p)) + list(p) for p in distinct]
        ids_NL = torch.tensor(padded, device=self.device)
        mask_NL = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in distinct], device=self.device)
        if copies(net):
            drawn = decode(net, ids_NL, mask_NL, of_row, choose, self.stop_ids, self.sampling.max_tokens)
            return [self._cut(*row) for row in zip(*(x.tolist() for x in drawn))]
        chosen = Chosen(choose, width)
        out_BL = net.generate(
            input_ids=ids_NL[of_row],
            attention_mask=mask_NL[of_row],
            generation_config=net.generation_config,
            logits_processor=LogitsProcessorList([chosen]),
            synced_gpus=False,  # ZeRO-3's parameters are gathered
        )
        drawn_BT = out_BL[:, width:]
        return [self._cut(*row) for row in zip(drawn_BT.tolist(), chosen.logps(drawn_BT.shape[1]).tolist())]

    def _cut(self, ids: list[int], logps: list[float]) -> Sampled:
        end = next((t for t, token in enumerate(ids) if token in self.stop_ids), None)
        size = len(ids) if end is None else end + 1
        return Sampled(tuple(ids[:size]), tuple(logps[:size]), end is not None)


def bare(model: Any) -> Any:
    """The transformers model below DDP, DeepSpeed and PEFT. PEFT's layers stay in it, and in force."""
    model = unwrapped(model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def adapted(model: Any) -> Any:
    """The PEFT model below DDP and DeepSpeed."""
    model = unwrapped(model)
    assert hasattr(model, "disable_adapter"), f"{type(model).__name__} has no adapter to switch off"
    return model


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
