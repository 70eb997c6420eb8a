"""How fast a run is and how near to what the hardware can do."""

from __future__ import annotations

import re
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from po.forest import Forest, Padded
from po.metrics import Meter

# Dense bf16 FLOP/s by device name, from the vendors' data sheets (torchtitan's and TRL's tables); first match wins.
_PEAKS = (
    ("GB300|GB200", 2.5e15),
    ("B300|B200", 2.25e15),
    ("H100 NVL|H200 NVL", 835e12),
    ("H100 PCIe", 756e12),
    ("H100|H200|GH200", 989e12),
    ("H20", 148e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("A10G?", 125e12),
    ("L4", 121e12),
    ("A6000", 154.85e12),
    ("MI355X", 2.5e15),
    ("MI300X|MI325X", 1.3e15),
    ("MI250X", 191.5e12),
)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s that the device could reach: dense bf16 by data sheet on a GPU (None for an unknown one, and for other
    types than bf16 and fp16); on a CPU the best of a few measured matrix products (0.1 s)."""
    if device.type == "cpu":
        return _measured(dtype)
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for known, flops in _PEAKS if re.search(rf"\b(?:{known})\b", name, re.IGNORECASE)), None)


def _measured(dtype: torch.dtype) -> float:
    n, best, end = 384, float("inf"), time.perf_counter() + 0.1
    a = torch.ones(n, n, dtype=dtype)
    while time.perf_counter() < end:
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def peak_gib(device: torch.device) -> float:
    """The most memory this process has held, GiB: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


@dataclass(frozen=True)
class Cost:
    """Training FLOPs of one policy: forward and backward, without recomputation and without the reference's forward.

    A trained weight costs 6 FLOPs per position it is used at, a frozen one 4 (nobody wants its gradient); a query that
    sees one key costs 12 per attention channel. Counted are positions that hold tokens, keys that are really seen, and
    head outputs at response tokens only. Of a mixture's experts only those a token visits count.
    """

    position: float
    response_token: float
    seen_key: float

    @classmethod
    def of(cls, model: nn.Module) -> Cost:
        """From the model's weights and config; before ZeRO-3 or after it."""
        head = model.get_output_embeddings()  # type: ignore[operator]
        tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
        in_head = {id(p): p for p in head.parameters()} if head is not None else {}
        config = model.config.get_text_config()  # type: ignore[union-attr, operator]
        experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
        visited = config.num_experts_per_tok / experts if experts else 1.0
        body = 0.0
        for name, p in model.named_parameters():
            if id(p) in tables or id(p) in in_head or "original_module" in name:
                continue
            body += _weight_flops(p) * (visited if ".experts." in name else 1.0)
        channels = 0
        if heads := getattr(config, "num_attention_heads", None):
            width = getattr(config, "head_dim", None) or config.hidden_size // heads
            channels = heads * width * config.num_hidden_layers
        return cls(body, sum(map(_weight_flops, in_head.values())), 12.0 * channels)

    def __call__(self, stream: Forest | Padded) -> float:
        """FLOPs of one micro-batch; reads the host's copy of the stream."""
        seen = _seen(stream)
        return self.position * positions(stream) + self.response_token * stream.target_T.numel() + self.seen_key * seen


def _weight_flops(p: nn.Parameter) -> float:
    return (6.0 if p.requires_grad else 4.0) * float(getattr(p, "ds_numel", p.numel()))


def positions(stream: Forest | Padded) -> int:
    """Stream positions that hold a token."""
    return stream.input_S.numel() if isinstance(stream, Forest) else int(stream.mask_NL.sum())


def _seen(stream: Forest | Padded) -> int:
    """Pairs of a query and a key that it sees: a position sees itself and all before it on its branch."""
    if isinstance(stream, Forest):
        return int((stream.position_S + 1).sum())
    return int((stream.mask_NL.cumsum(-1) * stream.mask_NL).sum())


class Speed:
    """Counts positions and FLOPs on the host, and turns them into rates at a log line.

    Time is wall time between log lines, less what passes inside `paused` (evaluation, saving).
    """

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        self.cost, self._device = Cost.of(model), device
        self._peak = peak_flops(device, dtype)
        self._positions, self._flops = 0, 0.0
        self._start, self._out = time.perf_counter(), 0.0

    def count(self, streams: Sequence[Forest | Padded]) -> None:
        """The micro-batches of one optimizer step of this rank, while they are on the host."""
        self._positions += sum(map(positions, streams))
        self._flops += sum(map(self.cost, streams))

    @contextmanager
    def paused(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._out += time.perf_counter() - start

    def put(self, meter: Meter) -> None:
        """This rank's figures since the last call, to be exchanged with the others' by `meter.flush`."""
        meter.total("perf/positions", self._positions)
        meter.total("perf/flops", self._flops)
        if self._peak is not None:
            meter.total("perf/peak_flops", self._peak)
        meter.peak("perf/seconds", max(time.perf_counter() - self._start - self._out, 1e-9))
        meter.peak("perf/peak_gib", peak_gib(self._device))
        self._positions, self._flops, self._start, self._out = 0, 0.0, time.perf_counter(), 0.0

    @staticmethod
    def rates(found: dict[str, float]) -> int:
        """Replace what `put` put in by perf/tokens_per_s (stream positions of all ranks per second) and perf/mfu (share
        of the FLOP/s that the ranks' devices could reach; absent where that is unknown). Returns the positions."""
        seconds, count = found.pop("perf/seconds"), found.pop("perf/positions")
        flops, peak = found.pop("perf/flops"), found.pop("perf/peak_flops", None)
        found["perf/tokens_per_s"] = count / seconds
        if peak is not None:
            found["perf/mfu"] = flops / seconds / peak
        return int(count)
