"""Near-duplicates by MinHash: signatures of word triples (datasketch), banded and compared as arrays.

Of 1 M rows the signatures take 256 MB. Rows that share one of 16 bands of 4 values are compared, each with the next and
the first of its band; what is found is an estimate of the Jaccard similarity, with a standard error of at most 0.0625.
"""

from __future__ import annotations

import hashlib
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

PERMUTATIONS, BANDS = 64, 16
_ROWS = PERMUTATIONS // BANDS
_PART = 1 << 16  # comparisons at once


def available() -> bool:
    """Whether datasketch is installed."""
    try:
        import datasketch  # noqa: F401
    except ImportError:
        return False
    return True


def shingles(text: str) -> set[str]:
    """Triples of words, lower case; a shorter text is one."""
    words = text.lower().split()
    return {" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2))}


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=4).digest(), "little")


@cache
def _empty() -> Any:
    from datasketch import MinHash

    return MinHash(num_perm=PERMUTATIONS, seed=1, hashfunc=_hash)


def signature(pieces: set[str]) -> bytes:
    """The MinHash of a set of texts as PERMUTATIONS 32-bit numbers."""
    one = _empty().copy()
    one.update_batch([p.encode(errors="replace") for p in pieces])
    return bytes(one.hashvalues.astype(np.uint32).tobytes())


def jaccard(a: set[str], b: set[str]) -> float:
    """The share of all that both have."""
    return len(a & b) / len(a | b) if a or b else 1.0


def groups(signatures: bytes | bytearray, threshold: float) -> NDArray[np.int64]:
    """For each row the first row that it is, in steps, a near-duplicate of; itself where there is none."""
    sig_NP = np.frombuffer(signatures, dtype=np.uint32).reshape(-1, PERMUTATIONS)
    leader_N = np.arange(len(sig_NP))
    for band in range(BANDS):
        part_NR = sig_NP[:, band * _ROWS : (band + 1) * _ROWS].astype(np.uint64)
        key_N = part_NR[:, 0]
        for column_N in part_NR.T[1:]:
            key_N = key_N * np.uint64(0x9E3779B97F4A7C15) + column_N
        order_N = np.argsort(key_N, kind="stable")
        same_N = key_N[order_N][1:] == key_N[order_N][:-1]
        start_N = np.where(np.r_[True, ~same_N], np.arange(len(order_N)), 0)
        first_N = order_N[np.maximum.accumulate(start_N)]
        left, right = np.r_[order_N[:-1][same_N], first_N[1:][same_N]], np.tile(order_N[1:][same_N], 2)
        _join(leader_N, left, right, sig_NP, threshold)
    return np.array([_root(leader_N, n) for n in range(len(leader_N))], dtype=np.int64)


def _join(
    leader_N: NDArray[np.int64],
    left: NDArray[np.int64],
    right: NDArray[np.int64],
    sig_NP: NDArray[np.uint32],
    threshold: float,
) -> None:
    for at in range(0, len(left), _PART):
        a, b = left[at : at + _PART], right[at : at + _PART]
        near = (sig_NP[a] == sig_NP[b]).mean(1) >= threshold
        for x, y in zip(a[near].tolist(), b[near].tolist()):
            low, high = sorted((_root(leader_N, x), _root(leader_N, y)))
            leader_N[high] = low


def _root(leader_N: NDArray[np.int64], n: int) -> int:
    while leader_N[n] != n:
        leader_N[n] = leader_N[leader_N[n]]
        n = int(leader_N[n])
    return n
