"""Sampling from a vLLM server, to which the trained weights are sent after every update.

The server is vLLM's own (`launch/vllm_server.py` starts it), spoken to by TRL's client: HTTP for samples, from every
rank for its own prompts; NCCL for weights, from rank 0. Tested against a local server that answers as TRL's client
expects, with the NCCL engine replaced; never run against a real vLLM.

A seed makes the requests equal, not the server's arithmetic: vLLM's kernels depend on what else is in the batch.
"""

from __future__ import annotations

import hashlib
import math
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from po.errors import UserError
from po.ranks import rank
from po.rollout.sampler import Sampled, Sampling, counts
from po.rollout.served import served

Mode = Literal["raw_logprobs", "processed_logprobs"]
START = "Start it with `python launch/vllm_server.py RECIPE`, on a GPU of its own, and wait until it answers"
_CONCURRENT = 64  # requests at a time, one per prompt; the server batches them


def logprobs_mode(sampling: Sampling) -> Mode:
    """What vLLM's `--logprobs-mode` must be for log-probs as `Sampled` has them: raw ones know no temperature,
    processed ones count only the tokens that top_k and top_p keep. UserError where neither will do."""
    if not is_cut(sampling):
        return "processed_logprobs"
    if sampling.temperature == 1:
        return "raw_logprobs"
    raise UserError(
        f"rollout: temperature {sampling.temperature:g} with top_p {sampling.top_p:g} and top_k {sampling.top_k}: "
        "vLLM reports log-probs either without the temperature or without the tokens that were cut, and both are "
        "wrong here. Set temperature: 1, or top_p: 1 and top_k: 0, or leave rollout.server out"
    )


def is_cut(sampling: Sampling) -> bool:
    return sampling.temperature > 0 and (sampling.top_p < 1 or sampling.top_k > 0)


class VLLMSampler:
    """A `Sampler` over a vLLM server at `url`. `update` must come before the first `sample`, on every rank at once.

    device: of this rank, a GPU; rank 0's takes part in sending weights. timeout: seconds for one request, after which
    the run ends with a UserError. start_timeout: how long to wait for the server to answer. group_port: a free port of
    this machine, where the server's workers meet rank 0.
    """

    def __init__(
        self,
        url: str,
        sampling: Sampling,
        stop_ids: Sequence[int],
        device: torch.device | str,
        *,
        timeout: float = 600.0,
        start_timeout: float = 240.0,
        group_port: int = 51216,
    ) -> None:
        mode = logprobs_mode(sampling)
        self.url, self.sampling, self.stop_ids, self.device = url, sampling, sorted(set(stop_ids)), device
        _wait_for(url, start_timeout)
        self._client = _connect(url, group_port, timeout)
        self._check_mode(mode)
        self._updated = False

    def sample(
        self, prompts: Sequence[tuple[int, ...]], n: int | Sequence[int], seeds: Sequence[int]
    ) -> list[list[Sampled]]:
        """One request per prompt, with a seed of its own: vLLM would give all prompts of one request the same noise."""
        assert self._updated, "the server has not been given the policy's weights: call `update` first"
        assert len(seeds) == len(prompts), f"{len(seeds)} seeds for {len(prompts)} prompts"
        each = counts(prompts, n)

        def ask(i: int) -> list[Sampled]:
            return self._ask(prompts[i], each[i], _mixed(seeds[i])) if each[i] else []

        with ThreadPoolExecutor(_CONCURRENT) as pool:
            return list(pool.map(ask, range(len(prompts))))

    def _ask(self, prompt: tuple[int, ...], n: int, seed: int) -> list[Sampled]:
        s = self.sampling
        cut = {"top_p": s.top_p, "top_k": s.top_k} if is_cut(s) else {}
        further = {"seed": seed, "stop_token_ids": self.stop_ids, "ignore_eos": True}
        drawn = n if s.temperature > 0 else 1  # vLLM refuses equal ones
        found = self._call(
            "generate",
            [list(prompt)],
            n=drawn,
            max_tokens=s.max_tokens,
            temperature=s.temperature,
            logprobs=0,
            generation_kwargs=further,
            **cut,
        )
        ids, logps = found["completion_ids"], found["logprobs"]
        if found["prompt_ids"] != [list(prompt)] or len(ids) != drawn or not logps:
            raise UserError(f"rollout.server: {self.url} answered for other prompts, or without log-probs. {START}")
        return [self._sampled(*one) for one in zip(ids, logps, strict=True)] * (n // drawn)

    def _sampled(self, ids: list[int], logps: list[list[float | None]]) -> Sampled:
        values = [math.nan if p is None else p for (p,) in logps]
        if len(values) != len(ids) or not all(map(math.isfinite, values)):
            raise UserError(
                f"rollout.server: {self.url} gave a token no finite log-prob; its model may hold NaN or Inf"
            )
        return Sampled(tuple(ids), tuple(values), ids[-1] in self.stop_ids)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Send all weights, adapters merged, and forget what the server had computed. All ranks at once; under ZeRO-3
        every rank helps to gather them."""
        _together()  # nobody samples any more
        sent = served(model)
        if rank() == 0:
            if self._client.communicator is None:
                self._call("init_communicator", device=self.device)
            about = [(s.name, str(s.parameter.dtype).removeprefix("torch."), s.shape()) for s in sent]
            self._call("update_named_params", about, ((s.name, s.whole()) for s in sent))
            self._call("reset_prefix_cache")
        else:
            for s in sent:
                s.whole()
        _together()  # nobody samples before
        self._updated = True

    def close(self) -> None:
        """Leave the group in which weights are sent."""
        self._client.close_communicator()

    def _check_mode(self, needed: Mode) -> None:
        """The likeliest of all tokens where only one is kept: processed, its probability is 1."""
        first = [self.stop_ids[0] if self.stop_ids else 0]
        found = self._call("generate", [first], max_tokens=1, top_k=1, logprobs=0)["logprobs"]
        if not found:
            raise UserError(f"rollout.server: {self.url} gives no log-probs. {START}")
        mode = "processed_logprobs" if found[0][0][0] == 0 else "raw_logprobs"
        plain = self.sampling.temperature in (0, 1) and not is_cut(self.sampling)  # then they are the same
        if mode != needed and not plain:
            raise UserError(
                f"rollout.server: {self.url} reports {mode}; expected {needed} at temperature "
                f"{self.sampling.temperature:g}, top_p {self.sampling.top_p:g}, top_k {self.sampling.top_k}. "
                f"Restart it with `--logprobs-mode {needed}`, as `python launch/vllm_server.py RECIPE` does"
            )

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return getattr(self._client, method)(*args, **kwargs)
        except Exception as e:  # TRL raises bare Exceptions
            raise UserError(
                f"rollout.server: {self.url}: {method} failed: {type(e).__name__}: {str(e)[:500]}. See what the server "
                f"printed; it needs `--weight-transfer-config` and VLLM_SERVER_DEV_MODE=1. {START}"
            ) from e


def _mixed(seed: int) -> int:
    """vLLM adds the sample's number to the seed, so that neighbouring ones would share draws."""
    return int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=7).digest())


def _wait_for(url: str, timeout: float) -> None:
    """Return once the server says that it is well."""
    end, found = time.monotonic() + timeout, ""
    while True:
        try:
            with urllib.request.urlopen(f"{url.rstrip('/')}/health", timeout=max(1.0, timeout)):
                return
        except ValueError as e:
            raise UserError(f"rollout.server: expected an address like http://localhost:8000, got {url!r}") from e
        except urllib.error.HTTPError as e:
            found = f"it answers /health with {e.code}"
        except OSError as e:
            found = f"no answer ({getattr(e, 'reason', e)})"
        if time.monotonic() >= end:
            raise UserError(f"rollout.server: {url}: {found} after {timeout:g} s; expected a vLLM server. {START}")
        time.sleep(min(2.0, max(0.0, end - time.monotonic())))


def _connect(url: str, group_port: int, timeout: float) -> Any:
    """TRL's client, which by itself waits for ever, and repeats requests that were received."""
    try:
        import requests
        from trl.generation.vllm_client import VLLMClient
        from urllib3.util.retry import Retry

        client = VLLMClient(base_url=url.rstrip("/"), group_port=group_port)
    except ImportError as e:
        raise UserError(
            f"rollout.server: {e}. The trainer needs TRL's client and vLLM beside it: pip install 'po[trl]' vllm; or "
            "leave rollout.server out, and the policy generates in this process"
        ) from e
    except Exception as e:
        raise UserError(f"rollout.server: {url} does not answer as vLLM does: {e}. {START}") from e
    adapter = requests.adapters.HTTPAdapter(max_retries=Retry(3, read=0, status=0), pool_maxsize=_CONCURRENT)
    client.session.mount("http://", adapter)
    client.session.mount("https://", adapter)
    client.session.request = partial(client.session.request, timeout=timeout)
    return client


def _together() -> None:
    if dist.is_initialized():
        dist.barrier()
