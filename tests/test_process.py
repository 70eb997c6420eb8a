"""What a run changes in its own process."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import pytest
import torch
from forked import Job

from po.process import keep_freed_memory


def _faults() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 24)  # 64 MiB: 16384 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def reuses_pages() -> int:
    mapped = [_faults() for _ in range(3)][-1]
    keep_freed_memory()
    kept = [_faults() for _ in range(3)][-1]
    print(mapped, kept)
    return 0 if mapped > 10 and kept < mapped / 10 else 1


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_a_large_tensor_takes_the_pages_of_the_one_before(tmp_path: Path) -> None:
    job = Job(tmp_path / "log", reuses_pages)
    assert job.wait() == [0], (tmp_path / "log").read_text()
