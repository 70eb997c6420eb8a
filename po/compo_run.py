"""`po compo RECIPE`: ComPO's part of a run (po.compo): split a recipe's pairs, and step on the output layer.

    po compo recipe.yaml --out runs/split --split-only                    # counts, and clean.jsonl
    po train recipe.yaml data.train=runs/split/clean.jsonl output_dir=runs/clean           # DPO on the clean pairs
    po compo recipe.yaml --policy runs/clean --out runs/compo             # steps over the noisy pairs

The recipe names the rows and the reference; a pair is noisy where |log ref(y_w) - log ref(y_l)| <= `noisy`. The policy
is a finished run, or the recipe's own model. What is written is the whole model, an adapter merged into it, in the base
checkpoint's dtype: transformers and vLLM load it, and it is no run, so `po export` has nothing to do. An output layer
that shares its weight with the embedding gets its own copy first, or the hidden states would change with it.

A step reads hidden states once per pair and then only the output layer, on one device. Directions come from the
recipe's seed. The layer is kept every few minutes: the same command goes on where it was killed, to the same bits.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from po.batch import Collate, Group, Groups
from po.compo import ComPO, Oracle, estimate
from po.data.sources import open_sources
from po.errors import UserError
from po.finished import find_run, tokenizer_of
from po.heads.dpo import DPO
from po.load import load_data
from po.logprob import Want, against, install, score
from po.merge import check_tensors, each_tensor, load_plain, load_trained, merge
from po.policy import load_tokenizer, tokenizer_key
from po.process import quiet, say
from po.recipe import load as load_recipe
from po.reference import build_reference
from po.spec import Recipe, Term
from po.weights import checkpoint_dtype, fingerprint, locate

REPORT = "compo.json"
_PROGRESS = "compo-progress.safetensors"
_SAVE_AFTER = 300.0  # seconds of work that a kill may lose


@dataclass(frozen=True)
class Split:
    """A recipe's pairs by the reference's margin, log ref(y_w) - log ref(y_l) in nats."""

    groups: Groups
    margins: tuple[float, ...]
    noisy: tuple[int, ...]  # items

    def line(self, limit: float) -> str:
        """For people."""
        n, k = len(self.margins), len(self.noisy)
        return f"{n} pairs: {n - k} clean, {k} noisy ({k / n:.1%}; |reference margin| <= {limit:g} nats)"


@dataclass(frozen=True)
class Policy:
    """A whole model, its output layer apart."""

    net: Any  # in the dtype that it is saved in
    dtype: str
    theta_VD: Tensor  # fp32
    untied: bool
    key: str  # of its weights


def run(recipe_path: str, policy: Path | None, out: Path, how: ComPO, split_only: bool = False) -> str:
    """The command; returns a report for people. UserError for what cannot be split, loaded or written."""
    quiet()
    recipe, _ = load_recipe(recipe_path, [])
    _check_out(out)
    source = None if policy is None else find_run(policy)
    tokenizer = load_tokenizer(recipe.model)
    if source is not None and tokenizer_key(load_tokenizer(tokenizer_of(source))) != tokenizer_key(tokenizer):
        raise UserError(
            f"--policy {policy}: its tokenizer or chat template differs from that of {recipe_path}, so the rows would "
            "be other tokens to it. Train it with the same model.tokenizer and model.chat_template"
        )
    split = split_pairs(recipe, tokenizer, how)
    line = split.line(how.noisy)
    out.mkdir(parents=True, exist_ok=True)
    if split_only:
        return f"{line}\n{_write_clean(recipe, split, out)}"
    if not split.noisy:
        least = min(map(abs, split.margins))
        raise UserError(f"{recipe_path}: no pair is noisy: the least |reference margin| is {least:.3g}. Raise --noisy")
    return f"{line}\n{_steps_and_save(recipe, load_policy(recipe, policy), split, how, tokenizer, out)}"


def split_pairs(recipe: Recipe, tokenizer: Any, how: ComPO) -> Split:
    """The pairs that the recipe trains on, by its reference; cached log-probs are used and kept."""
    if recipe.reference.source == "none":
        raise UserError("reference: none; ComPO splits pairs by the reference's log-probs. Write `reference: init`")
    data = load_data(recipe, tokenizer)
    if data.layout != "pair":
        raise UserError(f"loss: its heads train on the layout {data.layout!r}; ComPO needs pairs. Use e.g. head 'dpo'")
    asked = replace(recipe, loss=(Term(DPO()),), reference=replace(recipe.reference, kind="cached"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reference = build_reference(asked, [data.train], share_prefix=False, device=device)
    assert reference is not None
    assert reference.lookup is not None
    margins, examples = [], data.train.light().examples
    for item in data.train.items:
        e = examples[item.example]
        logps = [math.fsum(reference.lookup(e.prompt_ids, e.response_ids[k])) for k in item.responses]
        margins.append(logps[0] - logps[1])
    return Split(data.train, tuple(margins), tuple(i for i, m in enumerate(margins) if abs(m) <= how.noisy))


def load_policy(recipe: Recipe, folder: Path | None) -> Policy:
    """The model that the steps start from, on the CPU: merged in fp32, then in the checkpoint's dtype but for theta."""
    spec = recipe.model
    key = [fingerprint(spec.name_or_path, spec.revision)]
    if folder is None:
        adapter = None if spec.adapter is None else locate(spec.adapter, None, "model.adapter")
        whole = locate(spec.name_or_path, spec.revision)
    else:
        found = find_run(folder)
        if found.sharded:
            raise UserError(f"--policy {folder}: holds DeepSpeed's shards only; give the finished run's folder")
        spec, whole, adapter = found.base, folder, folder if found.adapted else None
    if folder is not None or adapter is not None:
        key.append(fingerprint(str(adapter or whole)))
    net = load_plain(whole, spec.trust_remote_code) if adapter is None else merge(load_trained(spec, adapter))
    head = net.get_output_embeddings()
    if type(head) is not nn.Linear:
        kind = type(head).__name__
        raise UserError(f"{spec.name_or_path}: its output layer is a {kind}; ComPO steps on a plain linear one")
    theta_VD = head.weight.detach().float().clone()
    untied = head.weight is net.get_input_embeddings().weight
    if untied:
        head.weight = nn.Parameter(head.weight.detach().clone())
        net.config.get_text_config().tie_word_embeddings = net.config.tie_word_embeddings = False
    dtype = checkpoint_dtype(locate(spec.name_or_path, spec.revision))
    net = net.to(getattr(torch, dtype)).requires_grad_(False).eval()
    install(net)
    return Policy(net, dtype, theta_VD, untied, "+".join(key))


@torch.no_grad()
def oracle(net: Any, group: Group, theta_VD: Tensor) -> Oracle:
    """A pair's comparisons with theta, from one forward."""
    batch = Collate(False)([group]).to(theta_VD.device)
    final_TD = score(net, batch.stream, Want(final=True)).final_TD
    assert final_TD is not None
    bias_V, shape = net.get_output_embeddings().bias, against(final_TD, net).shape
    bias_V = None if bias_V is None else bias_V.float()
    return Oracle(final_TD.float(), batch.stream.target_T, batch.seg.slot_T == 1, theta_VD, bias_V, shape)


def _steps_and_save(recipe: Recipe, policy: Policy, split: Split, how: ComPO, tokenizer: Any, out: Path) -> str:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net, start_VD = policy.net.to(device), policy.theta_VD.to(device)
    used = [split.groups[i, True] for i in split.noisy[: how.pairs]]
    said = (policy.key, asdict(how), recipe.seed, device.type, [group.example.where for group in used])
    key = hashlib.sha256(repr(said).encode()).hexdigest()
    theta_VD, log = _steps(net, start_VD, used, how, recipe.seed, out, key)
    kept_VD = theta_VD.to(getattr(torch, policy.dtype))
    delta_VD = kept_VD.float() - start_VD
    chosen, rejected = torch.tensor([oracle(net, g, start_VD).changes(delta_VD) for g in used]).mean(0).tolist()
    net.get_output_embeddings().weight.copy_(kept_VD)
    net.save_pretrained(out)
    tokenizer.save_pretrained(out)
    check_tensors(each_tensor(out), str(out))
    report = {"settings": asdict(how), "seed": recipe.seed, "pairs": len(split.margins), "noisy": len(split.noisy)}
    report |= {"dtype": policy.dtype, "untied": policy.untied, "chosen": chosen, "rejected": rejected, "log": log}
    (out / REPORT).write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    (out / _PROGRESS).unlink()
    taken, mean = sum(one["applied"] for one in log), sum(one["share"] for one in log) / len(log)
    lines = [
        f"{taken} of {len(used)} noisy pairs gave a step: more than {how.threshold:g} of their directions were good "
        f"({mean:.3f} in the mean)",
        f"on these pairs, as saved in {policy.dtype}: log pi(chosen) {chosen:+.4g}, log pi(rejected) {rejected:+.4g} "
        "nats in the mean",
        *(["the output layer shared its weight with the embedding; it has its own copy now"] if policy.untied else []),
        *([] if taken else ["no step was taken: the model is the one it started from"]),
    ]
    return "\n".join([*lines, f"saved the whole model to {out}"])


def _steps(
    net: Any, start_VD: Tensor, used: Sequence[Group], how: ComPO, seed: int, out: Path, key: str
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Theta after a step on each pair, and what each gave; kept on the way, and at the end."""
    theta_VD, log = _resume(out, key, start_VD)
    saved = time.monotonic()
    for n, group in enumerate(used):
        if n < len(log):
            continue
        step = estimate(theta_VD, oracle(net, group, theta_VD).better, how, (seed, n))
        if step.update is not None:
            theta_VD += step.update
        log.append({"row": group.example.where, "share": step.share, "applied": step.update is not None})
        log[-1]["kept"] = step.kept
        if n % 10 == 9 or n + 1 == len(used):
            say(f"{n + 1} of {len(used)} noisy pairs; {sum(one['applied'] for one in log)} steps taken")
        if time.monotonic() - saved > _SAVE_AFTER or n + 1 == len(used):
            _keep(out, key, theta_VD, log)
            saved = time.monotonic()
    return theta_VD, log


def _check_out(out: Path) -> None:
    """A folder that a killed command left goes on; otherwise there must be nothing that could be overwritten."""
    if out.is_dir() and not (out / _PROGRESS).is_file() and (names := sorted(p.name for p in out.iterdir())):
        raise UserError(f"--out: {out} holds {names[0]!r}; give a new folder, or that of the same command, killed")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: {out} is not a folder")


def _keep(out: Path, key: str, theta_VD: Tensor, log: list[dict[str, Any]]) -> None:
    partial = out / f"{_PROGRESS}.partial"
    save_file({"theta": theta_VD.cpu().contiguous()}, partial, metadata={"key": key, "log": json.dumps(log)})
    os.replace(partial, out / _PROGRESS)


def _resume(out: Path, key: str, start_VD: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
    """Theta and the log of the pairs behind it."""
    if not (out / _PROGRESS).is_file():
        return start_VD.clone(), []
    with safe_open(out / _PROGRESS, "pt") as f:
        meta = f.metadata()
        if meta["key"] != key:
            raise UserError(
                f"--out: {out} holds the progress of another command (other settings, seed, rows, policy or device); "
                "give a new folder"
            )
        log = json.loads(meta["log"])
        say(f"going on after {len(log)} pairs")
        return f.get_tensor("theta").to(start_VD.device), log


def _write_clean(recipe: Recipe, split: Split, out: Path) -> str:
    """The clean rows as they stood in the sources, a file for each, to train on."""
    noisy, light = set(split.noisy), split.groups.light()
    examples = [light.examples[item.example] for item in light.items]
    if odd := [e.where for e in examples if not e.is_pair]:
        raise UserError(f"--split-only: {odd[0]} is a set, of which a pair was derived; expected rows that are pairs")
    clean = {e.where for i, e in enumerate(examples) if i not in noisy}
    opened = open_sources(recipe.data.train, "train")
    lines = []
    for n, one in enumerate(opened):
        path = out / (f"clean-{n}.jsonl" if len(opened) > 1 else "clean.jsonl")
        rows = [r.data for r in one.records() if r.where in clean]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        lines.append(f"{len(rows)} clean rows of {one.source.path}: {path}")
    return "\n".join(lines)
