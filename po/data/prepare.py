"""Sources to Examples, once: read, convert, check, tokenize, apply the length policy, and keep the result on disk under
a key of everything that went in. Changing learning rate, head or output folder finds it again.

Several ranks may call `prepare` at once, before any process group exists: a file lock lets one work and the rest wait.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from po.data.build import Build
from po.data.formats import check_columns
from po.data.overlong import Limits
from po.data.report import DROPPED, DataReport
from po.data.rows import Example
from po.data.sources import Opened, open_sources
from po.data.store import EXAMPLES, REPORT, Examples, publish, sound, workspace, write
from po.data.tokenize import Encoder
from po.data.wanted import NOTHING_MORE, Wanted
from po.errors import UserError
from po.spec import DataSpec, Source
from po.weights import cache_root

FORMAT = 3  # raise when the same input would give other Examples


@dataclass(frozen=True)
class Prepared:
    """Tokenized rows, what became of the rest, and the key of everything that went in."""

    examples: Sequence[Example]
    report: DataReport
    key: str


def prepare(
    spec: DataSpec,
    sources: tuple[Source, ...],
    tokenizer: Any,
    tokenizer_key: str,
    split: str,
    wanted: Wanted = NOTHING_MORE,
    encoder: Callable[[Any, str], Encoder] = Encoder,
) -> Prepared:
    """Rows of `sources` as Examples, from the cache where it has them.

    tokenizer_key must cover the tokenizer's files and chat template. split ("train", "eval") is for messages.
    wanted: what the heads read beyond the ordinary. encoder: makes what renders rows of tokenizer and key; the key must
    cover what it adds to the tokenizer.
    Raises UserError for sources that cannot be opened, and where bad or overlong rows exceed what the spec allows.
    """
    if spec.max_length < 2:
        raise UserError(f"data.max_length: expected at least 2 tokens (prompt and response), got {spec.max_length}")
    if spec.max_prompt_length is not None and spec.max_prompt_length < 1:
        raise UserError(f"data.max_prompt_length: expected at least 1 token, got {spec.max_prompt_length}")
    for source in sources:
        check_columns(source, wanted)
    limits = Limits(spec.max_length, spec.max_prompt_length, spec.overlong, 1 if wanted.single else 2)
    opened = open_sources(sources, split)
    key = content_key(opened, tokenizer_key, limits, wanted)
    folder = cache_dir(spec) / key
    with _locked(folder):
        if not sound(folder):
            _fill(folder, Build(opened, encoder(tokenizer, tokenizer_key), limits, spec.num_proc, split, wanted))
    report = replace(DataReport.from_json(json.loads((folder / REPORT).read_text())), split=split)
    enforce(report, spec)
    return Prepared(Examples(folder / EXAMPLES), report, key)


def content_key(opened: Sequence[Opened], tokenizer_key: str, limits: Limits, wanted: Wanted) -> str:
    """SHA-256 over the sources' content and options, the tokenizer, the length policy, what heads want of rows, and the
    format's version."""
    options = [{k: v for k, v in asdict(o.source).items() if k != "path"} for o in opened]
    content = [o.fingerprint() for o in opened]
    parts = {"content": content, "options": options, "tokenizer": tokenizer_key, "limits": asdict(limits), "v": FORMAT}
    parts["wanted"] = wanted.of_rows()
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=dict).encode()).hexdigest()


def cache_dir(spec: DataSpec) -> Path:
    """Where prepared data lies: the recipe's folder, else $PO_CACHE/data, else ~/.cache/po/data."""
    if spec.cache_dir is not None:
        return Path(spec.cache_dir).expanduser()
    return cache_root("data")


def _fill(folder: Path, job: Build) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # unsound, or not there
    work = workspace(folder.parent)
    try:
        write(work / EXAMPLES, job.examples())
        (work / REPORT).write_text(json.dumps(job.report().to_json()))
        publish(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time per key. The kernel frees the lock of a process that dies. Where a file system has no locks
    all processes work, and the first to finish is kept: renaming the folder is atomic."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as file:
        if sys.platform != "win32":
            import fcntl

            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def enforce(report: DataReport, spec: DataSpec) -> None:
    """Raises UserError where the data is worse than the spec allows. Asked on every run, also on a cache hit."""
    c, where = report.counts, f"data.{report.split}"
    rows = c.get("in", 0)
    if not rows:
        raise UserError(f"{where}: the sources hold no rows")
    wrong = [f"{where}: {line}" for line in report.refusals]
    allowed = spec.max_bad * rows if spec.max_bad < 1 else spec.max_bad
    if c["bad"] > allowed:
        wrong.append(
            f"{where}: {c['bad']} of {rows} rows are bad; data.max_bad = {spec.max_bad:g} allows {int(allowed)}. "
            "Mend them, or raise data.max_bad (a share below 1, a count from 1 on)."
        )
        wrong += report.listing("bad")
    if wrong:
        raise UserError("\n".join(wrong))
    _enforce_lengths(report, spec)
    if not c["kept"]:
        raise UserError(f"{where}: no row is left to train on\n{report.summary()}")


def _enforce_lengths(report: DataReport, spec: DataSpec) -> None:
    c, where = report.counts, f"data.{report.split}"
    settled = c["in"] - c["bad"]
    lost = report.dropped + c.get("cut", 0)
    quantiles = ", ".join(f"{name} {n}" for name, n in report.lengths.items())
    too_long = c["overlong"] + c.get("too_long", 0)
    if spec.overlong == "error" and too_long:
        listing = [line for name in ("overlong", "too_long") for line in report.listing(name, shown=5)]
        raise UserError(
            f"{where}: {too_long} of {settled} rows are too long and data.overlong = error. "
            f"Prompt + longest response in tokens: {quantiles}. Raise data.max_length ({spec.max_length}), or choose "
            "overlong: drop | truncate_prompt | truncate_response.\n" + "\n".join(listing)
        )
    if settled and lost / settled > spec.max_dropped:
        listing = [line for name in (*DROPPED, "cut") for line in report.listing(name, shown=5)]
        counted = {"too long": c["overlong"], "identical": c["identical"], "empty": c["empty"], "cut": c.get("cut", 0)}
        said = ", ".join(f"{n} {name}" for name, n in counted.items() if n)
        longer = f"Raise data.max_length ({spec.max_length}), choose another data.overlong ({spec.overlong})"
        longer = longer if _by_length(c) else "Mend the rows"
        raise UserError(
            f"{where}: {lost} of {settled} rows ({lost / settled:.1%}) were dropped or cut ({said}); data.max_dropped "
            f"= {spec.max_dropped:g} allows {spec.max_dropped:.1%}. Prompt + longest response in tokens: {quantiles}. "
            f"{longer}, or accept the loss with data.max_dropped: {-(-lost * 100 // settled) / 100:g}.\n"
            + "\n".join(listing)
        )


def _by_length(c: Mapping[str, int]) -> bool:
    """Whether rows lost something to a limit of length, rather than to being alike or empty."""
    return bool(c["overlong"] or any(c.get(n, 0) for n in ("responses_overlong", "responses_cut", "prompts_cut")))
