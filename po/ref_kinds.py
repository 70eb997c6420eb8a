"""The three kinds of reference, as the trainer sees them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from po.batch import Batch, LookUp
from po.errors import UserError
from po.logprob import Against, Want, against, score
from po.spec import ReferenceSpec, Term
from po.unwrap import unwrapped


class RefParts(NamedTuple):
    """What a reference says of a batch, without gradient, in the order of the stream. None: was not asked for."""

    logp_T: Tensor  # fp32
    hidden_TLD: Tensor | None = None  # for Want.ref_hidden_TLD
    against: Against | None = None  # for Want.kl_against


class Reference(Protocol):
    """What the trainer sees of a reference."""

    lookup: LookUp | None  # prompt ids, response ids -> log-probs per token, where they are known beforehand
    starts_at_policy: bool  # the policy of step 0 is the reference
    net: nn.Module | None  # its own network, if it has one

    def logps(self, model: nn.Module, batch: Batch) -> Tensor:
        """log ref(y_t | x, y_<t), (T,) fp32 in the order of the stream. `model` is what the trainer holds."""
        ...

    def parts(self, model: nn.Module, batch: Batch, *, hidden: bool = False, kl: bool = False) -> RefParts:
        """The same, and from the same forward its hidden states and what a KL to it is taken against. Cached
        log-probs cannot say either (`check_live` refuses them before anything runs)."""
        ...


class Cached:
    """Log-probs computed once, for every head, beta, learning rate and output folder."""

    net: nn.Module | None = None

    def __init__(self, lookup: LookUp, starts_at_policy: bool) -> None:
        self.lookup: LookUp | None = lookup
        self.starts_at_policy = starts_at_policy

    def logps(self, model: nn.Module, batch: Batch) -> Tensor:
        assert batch.ref_T is not None, "Collate must be given the reference's lookup"
        return batch.ref_T

    def parts(self, model: nn.Module, batch: Batch, *, hidden: bool = False, kl: bool = False) -> RefParts:
        assert True not in (hidden, kl), "check_live was not called"
        return RefParts(self.logps(model, batch))


class Frozen:
    """A second copy of the model, whole on this rank's device."""

    lookup: LookUp | None = None

    def __init__(self, net: nn.Module, starts_at_policy: bool) -> None:
        self.net: nn.Module | None = net
        self.starts_at_policy = starts_at_policy

    def logps(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.parts(model, batch).logp_T

    @torch.no_grad()
    def parts(self, model: nn.Module, batch: Batch, *, hidden: bool = False, kl: bool = False) -> RefParts:
        assert self.net is not None
        return _parts(self.net, batch, hidden, kl, self.net)


class AdapterOff:
    """The policy with its adapter switched off: no memory, one more forward. Exact also for DoRA, trained copies of
    modules (modules_to_save) and tied ones, because the frozen originals are what then computes."""

    lookup: LookUp | None = None
    net: nn.Module | None = None

    def __init__(self, starts_at_policy: bool) -> None:
        self.starts_at_policy = starts_at_policy

    def logps(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.parts(model, batch).logp_T

    @torch.no_grad()
    def parts(self, model: nn.Module, batch: Batch, *, hidden: bool = False, kl: bool = False) -> RefParts:
        with unwrapped(model).disable_adapter():
            return _parts(model, batch, hidden, kl, None)


def _parts(model: nn.Module, batch: Batch, hidden: bool, kl: bool, head_of: nn.Module | None) -> RefParts:
    seen = score(model, batch.stream, Want(batch.temperature, hidden=hidden, final=kl))
    target = None if seen.final_TD is None else against(seen.final_TD, head_of, batch.temperature)
    return RefParts(seen.logp_T.float(), seen.hidden_TLD, target)


def check_live(terms: Sequence[Term], reference: ReferenceSpec) -> None:
    """Raise UserError where a head reads more of the reference than log-probs, and only those are kept."""
    live = [t.head for t in terms if t.head.needs.live_reference]
    if reference.kind != "cached" or not live:
        return
    what = "KL to the reference at every token" if live[0].needs.token_kl else "hidden states of the reference"
    raise UserError(
        f"reference.kind: the head {type(live[0]).__name__} reads the {what}, and `cached` keeps log-probs alone. "
        "Use `kind: adapter_off` (LoRA: no further memory) or `kind: frozen` (a second copy of the model)"
    )
