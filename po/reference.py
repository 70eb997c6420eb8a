"""The reference: log ref(y_t | x, y_<t) from weights that the recipe names and that are checked, so it cannot be wrong.

    reference = build_reference(recipe, [train, eval], share_prefix=..., device=..., rank=..., world=...)
    Collate(share_prefix, reference.lookup)       # cached: a batch brings its ref_T; else lookup is None
    reference.logps(model, batch)                 # (T,) fp32; frozen and adapter_off compute it here
    reference.parts(model, batch, hidden=True, kl=True)       # and what else `score` wants of a reference
    check_start(policy_T, ref_T, batch, dtype)    # step 0, first batch, in eval mode, if reference.starts_at_policy

Call `build_reference` on every rank, after the process group exists: `cached` computes what the store lacks (each rank
a share, on its device, with the whole model in memory) and frees the model again.
"""

from __future__ import annotations

import gc
import hashlib
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from po.batch import Batch, Groups
from po.errors import NumericsError, UserError
from po.logp_store import LogpStore
from po.policy import load_frozen, load_tokenizer, plainly
from po.ranks import on_any
from po.ref_cache import RefCache, compute_dtype, tolerance
from po.ref_kinds import AdapterOff, Cached, Frozen, Reference, check_live
from po.sharing import share
from po.spec import ModelSpec, Recipe, ReferenceSpec
from po.weights import cache_root, checkpoint_dtype, fingerprint, is_adapter, locate

__all__ = [
    "AdapterOff",
    "Cached",
    "Frozen",
    "Reference",
    "build_reference",
    "check_kind",
    "check_live",
    "check_start",
    "compute_dtype",
    "identity",
]

_CODE = "1"  # raise it when a change in the code changes log-probs


class ReferenceIdentity(NamedTuple):
    """What `init | base | <path>` means in weight files."""

    model: ModelSpec  # what to load
    key: str  # content of its weight files, adapter included
    is_init: bool  # the policy starts at these weights
    is_base: bool  # they are the policy's without any adapter


def identity(model: ModelSpec, reference: ReferenceSpec) -> ReferenceIdentity:
    """init: the base with the adapter that the run continues, if any; base: without it; a path: a model, or an adapter
    on the base. Raises UserError where files are missing or pickled."""
    base = fingerprint(model.name_or_path, model.revision)
    init = base if model.adapter is None else f"{base}+{fingerprint(model.adapter, where='model.adapter')}"
    source = reference.source
    assert source != "none", "a run without a reference has no identity to ask for"
    if source == "init":
        spec, key = model, init
    elif source == "base":
        spec, key = replace(model, adapter=None), base
    else:
        key = fingerprint(source, where="reference.from")
        if is_adapter(locate(source, None, "reference.from")):
            spec, key = replace(model, adapter=source), f"{base}+{key}"
        else:
            spec = replace(model, name_or_path=source, revision=None, adapter=None, tokenizer=None, chat_template=None)
    return ReferenceIdentity(spec, key, key == init, key == base)


def check_kind(recipe: Recipe, what: ReferenceIdentity) -> None:
    """Raise UserError where `adapter_off` would be another reference than the one that `from` names."""
    if recipe.reference.kind != "adapter_off":
        return
    if recipe.lora is None and recipe.model.adapter is None:
        raise UserError(
            "reference.kind: adapter_off needs an adapter to switch off, and this run trains all weights. "
            "Add `lora: {}`, or use `kind: cached`"
        )
    if not what.is_base:
        named = f"the base with the adapter {what.model.adapter!r}" if what.model.adapter else "another model"
        raise UserError(
            f"reference.kind: adapter_off makes the base model the reference, but `from: {recipe.reference.source}` "
            f"is {named}. Use `kind: cached` (or frozen), or `from: base`"
        )


def build_reference(
    recipe: Recipe,
    groups: Sequence[Groups],
    *,
    share_prefix: bool = True,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world: int = 1,
    autocast: torch.dtype | None = None,
) -> Reference | None:
    """The recipe's reference, ready to give log-probs for all `groups`; None where no head needs one.

    autocast: the dtype of the Trainer's mixed precision, if on: policy and reference must compute alike.
    Leaves the random state as it was. Raises UserError as `identity`, `check_kind` and `check_live` do, and for a cache
    folder that the ranks do not share; NumericsError where stored log-probs differ from the live model's.
    """
    if not any(term.head.needs.any_reference for term in recipe.loss):
        return None
    check_live(recipe.loss, recipe.reference)
    what = identity(recipe.model, recipe.reference)
    check_kind(recipe, what)
    if recipe.reference.source not in ("init", "base"):
        _check_vocabulary(recipe.model, what.model)
    if recipe.reference.kind == "adapter_off":
        return AdapterOff(what.is_init)
    device = torch.device(device)
    if recipe.reference.kind == "frozen":
        return Frozen(_load(what.model, device, share_prefix), what.is_init)
    about = {"model": what.model.name_or_path, "adapter": what.model.adapter or "", "weights": what.key}
    cache = RefCache(LogpStore(cache_folder(recipe, what, autocast), about), share_prefix, autocast)
    net = None
    for _ in range(3):
        todo = cache.missing(groups)
        if not on_any(torch.tensor(bool(todo), device=device)):
            break
        net = net or _load(what.model, device, share_prefix)
        cache.fill(net, groups, todo, rank, world)
        on_any(torch.tensor(False, device=device))
        cache.store.refresh()
    else:
        raise UserError(
            f"reference.cache_dir: {cache.store.folder} lacks {len(todo)} responses that other ranks computed. "
            "It must lie on a file system that all nodes share"
        )
    if rank == 0:
        cache.probe(net or _load(what.model, device, share_prefix), groups, random.Random())
    del net
    gc.collect()
    torch.cuda.empty_cache()
    return Cached(cache.lookup, what.is_init)


def cache_folder(recipe: Recipe, what: ReferenceIdentity, autocast: torch.dtype | None = None) -> Path:
    """Where the log-probs of these weights, computed in this dtype by this version of the code, are kept."""
    model = what.model
    dtype = checkpoint_dtype(locate(model.name_or_path, model.revision)) if model.dtype == "auto" else model.dtype
    content = f"{what.key} {dtype} autocast={autocast} 4bit={model.load_in_4bit} code={_CODE}"
    root = recipe.reference.cache_dir
    return (Path(root).expanduser() if root else cache_root("reference")) / hashlib.sha256(content.encode()).hexdigest()


def _load(model: ModelSpec, device: torch.device, share_prefix: bool) -> nn.Module:
    with plainly(), torch.random.fork_rng():
        net: Any = load_frozen(model)
        if share_prefix:
            share(net if model.adapter is None else net.get_base_model())
        placed: nn.Module = net if model.load_in_4bit else net.to(device)
        return placed


def _check_vocabulary(policy: ModelSpec, reference: ModelSpec) -> None:
    """Token ids must mean the same to both."""
    if reference.name_or_path == policy.name_or_path:
        return
    if load_tokenizer(policy).get_vocab() != load_tokenizer(reference).get_vocab():
        raise UserError(
            f"reference.from: {reference.name_or_path!r} has another vocabulary than the policy's tokenizer "
            f"({policy.tokenizer or policy.name_or_path!r}), so its log-probs would be of other texts"
        )


def check_start(policy_T: Tensor, ref_T: Tensor, batch: Batch, dtype: torch.dtype = torch.float32) -> float:
    """The largest |log pi - log ref| of a batch in nats, for `init/ref_gap`. Both (T,), in the stream's order.

    dtype: what computed them (`compute_dtype(model)`). NumericsError where the difference is more than its rounding:
    training would start from a preference that nobody stated.
    """
    gap_T = (policy_T.float() - ref_T.float()).abs()
    limit = tolerance(dtype)
    if limit.allows(gap_T):
        return gap_T.max().item() if gap_T.numel() else 0.0
    t = int(gap_T.nan_to_num(torch.inf).argmax())
    slot_T = batch.seg.slot_T
    g, k = divmod(int(slot_T[t]), batch.seg.valid_GK.shape[-1])
    token = int((slot_T[:t] == slot_T[t]).sum())
    raise NumericsError(
        f"reference: the policy has not taken a step and yet differs from its reference by {gap_T[t].item():.4g} nats "
        f"at token {token} of response {k} of row {batch.ids[g]} (log pi {policy_T[t].item():.4f}, log ref "
        f"{ref_T[t].item():.4f}; mean over {gap_T.numel()} tokens {gap_T.mean().item():.4g}). In {dtype} the same "
        f"weights differ by {limit.largest:g} at most, {limit.mean:g} in the mean. So these are not the same model: "
        "the reference's weights are others, an adapter is missing on one side, a dropout is on, or the two run in "
        "different dtypes or attention"
    )
