"""`po export RUN`: a finished run's adapter, or its merged model, in a folder that others load, checked after writing.

The folder holds what it needs and nothing else: weights in safetensors, configuration, tokenizer, template, a README
and `export.json`, the SHA-256 of every file. A folder without a complete `export.json` is not an export.
"""

from __future__ import annotations

import gc
import hashlib
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from po import __version__
from po.data.rows import Example
from po.errors import NumericsError, UserError
from po.finished import Run, find_run, held_out, tokenizer_of
from po.merge import (
    check_equal,
    check_tensors,
    load_plain,
    load_shards,
    load_trained,
    log_probs,
    merge,
    read_tensors,
)
from po.policy import load_frozen, load_tokenizer
from po.recipe.checks import name_of
from po.ref_cache import tolerance
from po.weights import checkpoint_dtype, locate, read_config

MANIFEST = "export.json"
_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Drift:
    """Per-token log-prob differences between the trained model and the exported one, in nats."""

    largest: float
    mean: float
    tokens: int
    rows: int
    against: str


def export_run(
    run_dir: Path, out: Path | None, merged: bool, dtype: str | None = None, eval_path: str | None = None
) -> str:
    """Write the adapter or the merged model of a run, read it back, and return a report for people.

    out: None for RUN/export-adapter or RUN/export-merged; must be empty, missing or an earlier export. dtype: None
    for the base checkpoint's (merged) or the trained one (adapter). eval_path: rows for the drift; None for the
    recipe's evaluation rows, else its training rows. Nothing outside `out` is written. Raises UserError for a folder
    that cannot be exported and NumericsError for tensors that are not finite or log-probs that changed.
    """
    if dtype not in (None, *_DTYPES):
        raise UserError(f"--dtype: expected one of {', '.join(_DTYPES)}, got {dtype!r}")
    run = find_run(run_dir)
    if not merged and not run.adapted:
        raise UserError(f"{run_dir}: this run trained all weights, so it has no adapter. Use --merged")
    out = out or run_dir / ("export-merged" if merged else "export-adapter")
    if not run.sharded:
        check_tensors(read_tensors(run.folder).items(), str(run.folder))
    tokenizer = load_tokenizer(tokenizer_of(run))
    examples = held_out(run, tokenizer, eval_path)
    _clear(out, run_dir)
    write = _write_merged if merged else _write_adapter
    drift, kept = write(run, out, dtype, examples)
    tokenizer.save_pretrained(out)
    warnings = [] if merged else vllm_warnings(read_config(out))
    (out / "README.md").write_text(_card(run, merged, kept, drift), "utf-8")
    _seal(out, run, merged, kept, drift)
    lines = [f"{'merged model' if merged else 'adapter'} in {kept}: {out}", _drift_line(drift)]
    return "\n".join(lines + [f"warning: {w}" for w in warnings])


# Writing


def _clear(out: Path, run_dir: Path) -> None:
    """Make `out` an empty folder marked as an unfinished export. Only files of an earlier export are removed."""
    if out.resolve() in (run_dir.resolve(), *run_dir.resolve().parents):
        raise UserError(f"--out: {out} is or holds the run itself; give another folder")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UserError(f"--out: {out} is not a folder")
    if out.is_dir() and any(out.iterdir()):
        try:
            earlier = json.loads((out / MANIFEST).read_text("utf-8"))["files"]
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise UserError(f"--out: {out} is not empty and not an earlier export; give another folder") from e
        known = {p for p in out.iterdir() if p.name in earlier or p.name == MANIFEST or earlier == {}}
        if strange := sorted(p.name for p in out.iterdir() if p not in known or (p.is_dir() and not p.is_symlink())):
            raise UserError(f"--out: {out} holds {strange[0]!r}, which no export wrote; give another folder")
        for path in known:
            path.unlink()  # a link goes, its target stays
    out.mkdir(parents=True, exist_ok=True)
    (out / MANIFEST).write_text(json.dumps({"complete": False, "files": {}}) + "\n", "utf-8")


def _write_adapter(run: Run, out: Path, dtype: str | None, examples: list[Example]) -> tuple[Drift, str]:
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import save_file

    net = (
        load_shards(run.recipe.model, run.recipe.lora, run.folder)
        if run.sharded
        else load_trained(run.base, run.folder)
    )
    truth_T = _trained_log_probs(run, net, examples)
    expected = {name: t.contiguous() for name, t in get_peft_model_state_dict(net).items()}
    if not run.sharded:
        saved = read_tensors(run.folder)  # the run's own dtype, and its bits
        expected = {name: saved[name] for name in expected}
    if dtype is not None:
        expected = {name: t.to(getattr(torch, dtype)) for name, t in expected.items()}
    kept = str(next(iter(expected.values())).dtype).removeprefix("torch.")
    check_tensors(expected.items(), f"the adapter in {kept}")
    save_file({n: t.clone() for n, t in expected.items()}, out / "adapter_model.safetensors", metadata={"format": "pt"})
    config = net.peft_config["default"]
    config.inference_mode, config.base_model_name_or_path = True, run.base.name_or_path
    config.revision = run.base.revision
    config.save_pretrained(str(out))
    del net
    gc.collect()
    check_equal(read_tensors(out), expected, str(out))
    base = load_plain(locate(run.base.name_or_path, run.base.revision), run.base.trust_remote_code)
    loaded = PeftModel.from_pretrained(base, str(out)).eval()  # as anyone loads it
    return _drift(run, truth_T, log_probs(loaded, examples), kept, len(examples)), kept


def _write_merged(run: Run, out: Path, dtype: str | None, examples: list[Example]) -> tuple[Drift, str]:
    if run.sharded:
        net = load_shards(run.recipe.model, run.recipe.lora, run.folder)
    elif run.adapted:
        net = load_trained(run.base, run.folder)
    else:
        net = load_plain(run.folder, run.base.trust_remote_code)
    truth_T = _trained_log_probs(run, net, examples)
    if run.adapted:
        net = merge(net)
    kept = dtype or checkpoint_dtype(locate(run.base.name_or_path, run.base.revision))
    net = net.to(getattr(torch, kept))
    check_tensors(net.state_dict().items(), f"the model in {kept}")
    expected = {name: t.clone() for name, t in net.state_dict().items()}
    net.save_pretrained(out)
    del net
    gc.collect()
    check_tensors(read_tensors(out).items(), str(out))
    loaded = load_plain(out, run.base.trust_remote_code, dtype="auto")
    check_equal(dict(loaded.state_dict()), expected, str(out))
    return _drift(run, truth_T, log_probs(loaded, examples), kept, len(examples)), kept


# The drift


def _trained_log_probs(run: Run, net: Any, examples: list[Example]) -> Tensor:
    """What the export must reproduce: the trained model; under QLoRA with the 4-bit base that it was trained on."""
    if not _four_bit(run):
        return log_probs(net, examples)
    quantized = load_frozen(replace(run.base, adapter=str(run.folder)))
    found_T = log_probs(quantized, examples)
    del quantized
    gc.collect()
    return found_T


def _four_bit(run: Run) -> bool:
    return run.base.load_in_4bit and not run.sharded and importlib.util.find_spec("bitsandbytes") is not None


def _drift(run: Run, truth_T: Tensor, found_T: Tensor, dtype: str, rows: int) -> Drift:
    gap_T = (truth_T - found_T).abs()
    against = "the adapter on its base in fp32, unmerged" if run.adapted else "the run's model in fp32"
    if _four_bit(run):
        against = "the adapter on its 4-bit base"
    elif run.base.load_in_4bit:
        against += " (not in 4 bits as in training: that needs bitsandbytes)"
    drift = Drift(gap_T.max().item(), gap_T.mean().item(), gap_T.numel(), rows, against)
    if not _four_bit(run) and not tolerance(getattr(torch, dtype)).allows(gap_T):
        raise NumericsError(f"the export is not the model that was trained. {_drift_line(drift)}")
    return drift


def _drift_line(d: Drift) -> str:
    return (
        f"log-prob drift over {d.tokens} tokens of {d.rows} rows: max {d.largest:.2g}, mean {d.mean:.2g} nats per "
        f"token, against {d.against}"
    )


def vllm_warnings(config: Mapping[str, Any]) -> list[str]:
    """What in an adapter's configuration vLLM would not take."""
    found = []
    if config.get("modules_to_save"):
        found.append("vLLM refuses adapters with modules_to_save; serve the merged model (po export --merged)")
    if config.get("use_dora"):
        found.append("vLLM refuses DoRA adapters; serve the merged model (po export --merged)")
    rank = max([config.get("r", 0), *(config.get("rank_pattern") or {}).values()])
    if rank > 16:
        found.append(
            f"vLLM takes ranks up to 16 by default and this one has {rank}: start it with --max-lora-rank {rank}"
        )
    return found


# The papers


def _card(run: Run, merged: bool, dtype: str, drift: Drift) -> str:
    heads = [name_of(t.head) for t in run.recipe.loss]
    tags = ["po", *heads, *([] if merged or not run.adapted else ["lora"])]
    local = Path(run.base.name_or_path).is_absolute()  # the hub rejects a base_model that is a path
    front = [*([] if local else [f"base_model: {run.base.name_or_path}"])]
    front += [f"library_name: {'transformers' if merged else 'peft'}", "pipeline_tag: text-generation"]
    front += ["tags:", *(f"- {tag}" for tag in tags)]
    name = Path(run.base.name_or_path).name
    terms = "\n".join(f"- {t.weight:g} x `{t.head}`" for t in run.recipe.loss)
    what = f"{'The merged model' if merged else 'A LoRA adapter'} in {dtype}, trained with `po` {__version__}"
    return "\n".join(
        [
            "---", *front, "---", "",
            f"# {name}, aligned by preference optimization", "",
            f"{what}. Objective:", "",
            terms, "",
            f"Checked after writing: {_drift_line(drift)}. `export.json` has the SHA-256 of every file.", "",
            "## Recipe", "", "```yaml", run.recipe_file.read_text("utf-8").strip(), "```", "",
        ]
    )  # fmt: skip


def _seal(out: Path, run: Run, merged: bool, dtype: str, drift: Drift) -> None:
    files = {}
    for path in sorted(p for p in out.iterdir() if p.name != MANIFEST):
        with open(path, "rb") as f:
            h = hashlib.sha256()
            while chunk := f.read(1 << 22):
                h.update(chunk)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": h.hexdigest()}
    manifest = {
        "complete": True,
        "kind": "merged" if merged else "adapter",
        "run": str(run.folder.resolve()),
        "base": run.base.name_or_path,
        "revision": run.base.revision,
        "dtype": dtype,
        "drift": asdict(drift),
        "po": __version__,
        "files": files,
    }
    (out / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", "utf-8")
