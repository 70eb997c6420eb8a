"""What a log line says: sums and counts kept on the device, and one exchange between the ranks per line.

Every mean is a sum over a count, both added up over micro-batches, steps and ranks before the one division, so that
uneven batches weigh as they should. Nothing here waits for the device until `flush`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from po.heads import HEADS
from po.logprob import Scores
from po.numeric import masked_mean
from po.objective import Parts
from po.ranks import gather
from po.spec import Term
from po.types import HeadInput

Metric = tuple[str, Tensor, Tensor | None]  # name, values, which of them count (None: all)
_Kind = Literal["mean", "total", "peak"]


class Meter:
    """Means, totals and peaks by name. Ranks may have met different names; a name that counted nothing is left out."""

    def __init__(self) -> None:
        self._means: dict[str, Tensor] = {}  # name -> (sum, count)
        self._host: dict[str, tuple[_Kind, float]] = {}

    def add(self, name: str, values: Tensor, mask: Tensor | None = None) -> None:
        """Average `values`, of any shape, where `mask`, of the same shape, is True. No host synchronisation."""
        x = values.detach().to(torch.float64)
        where = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
        both = torch.stack([torch.where(where, x, 0).sum(), where.sum().to(torch.float64)])
        self._means[name] = self._means[name] + both if name in self._means else both

    def total(self, name: str, amount: float) -> None:
        """Add up over steps and ranks."""
        self._host[name] = ("total", self._host.get(name, ("total", 0.0))[1] + amount)

    def peak(self, name: str, value: float) -> None:
        """Keep the largest over steps and ranks."""
        self._host[name] = ("peak", max(value, self._host.get(name, ("peak", value))[1]))

    def flush(self) -> dict[str, float]:
        """The figures of all ranks since the last flush, sorted by name; empties the meter. Every rank must call it."""
        mine: dict[str, tuple[_Kind, float, float]] = {k: (kind, v, 1.0) for k, (kind, v) in self._host.items()}
        if self._means:
            sums = torch.stack(list(self._means.values())).tolist()
            mine |= {name: ("mean", s, n) for name, (s, n) in zip(self._means, sums)}
        self._means, self._host = {}, {}
        return _merge(gather(mine))


def _merge(ranks: Sequence[dict[str, tuple[_Kind, float, float]]]) -> dict[str, float]:
    out = {}
    for name in sorted({name for rank in ranks for name in rank}):
        found = [rank[name] for rank in ranks if name in rank]
        values = [v for _, v, _ in found]
        match found[0][0]:
            case "peak":
                out[name] = max(values)
            case "total":
                out[name] = sum(values)
            case "mean":
                count = sum(n for _, _, n in found)
                if count > 0:
                    out[name] = sum(values) / count
    return out


def names(terms: Sequence[Term]) -> list[str]:
    """What each term is called in metrics: its head's name, with _2, _3 ... where a head occurs again."""
    known = {head: name for name, head in HEADS.items()}
    base = [known.get(type(t.head), type(t.head).__name__.lower()) for t in terms]
    nth = [base[: i + 1].count(name) for i, name in enumerate(base)]
    return [name if n == 1 else f"{name}_{n}" for name, n in zip(base, nth)]


def preference_metrics(
    x: HeadInput, terms: Sequence[Term], parts: Parts, scores: Scores | None = None
) -> Iterator[Metric]:
    """Everything worth logging about one micro-batch, un-reduced, under TRL's names where TRL has one.

    rewards/*: beta * (log pi(y|x) - log ref(y|x)), beta of the first head that has one, else 1. chosen is the best
        response (`HeadInput.best_GK`), rejected the one with the lowest reward, or the last where there are no rewards;
        of unpaired rows, the desirable and the undesirable ones. accuracies counts a tie as one half; ties is their
        share.
    sets/accuracy: the same over every two responses of a set that the data's rewards order.
    kl/seq, kl/token: mean of log pi - log ref over the *data's* responses, per response and per token. It is not
        KL(pi || ref), which needs samples of pi: it is negative where the policy leaves the data's responses for
        others, however far it has gone. Sample (`python -m po.sandbox report` does) before trusting a run.
    logps/*: log pi(y|x), summed over tokens. lengths/*: tokens, EOS included.
    mean_token_accuracy: over the chosen responses. entropy: nats per token, over all responses.
    loss/<head>: the head's own mean, before its weight. <head>/<metric>: what the head reports.
    """
    chosen_GK, rejected_GK = sides(x, terms)
    valid_GK, length_GK = x.seg.valid_GK, x.seg.length_GK
    is_set = any(t.head.needs.layout == "set" for t in terms)
    logp_GK = x.seg.sum(x.policy_T)
    yield "logps/chosen", logp_GK, chosen_GK
    yield "logps/rejected", logp_GK, rejected_GK
    yield "lengths/chosen", length_GK, chosen_GK
    yield "lengths/rejected", length_GK, rejected_GK
    if is_set:
        yield "lengths/mean", length_GK, valid_GK
    if x.ref is not None:
        yield "kl/seq", x.logratio_GK, valid_GK
        yield "kl/token", x.logratio_T, x.seg.spread(valid_GK)
        yield from _rewards(x, _beta(terms) * x.logratio_GK, chosen_GK, rejected_GK, is_set)
    if scores is not None:
        yield from token_metrics(x, terms, scores)
    yield from _heads(x, terms, parts)


def token_metrics(x: HeadInput, terms: Sequence[Term], scores: Scores) -> Iterator[Metric]:
    """What only the model's own pass over a micro-batch knows."""
    chosen_GK, _ = sides(x, terms)
    yield "mean_token_accuracy", scores.correct_T, x.seg.spread(chosen_GK)
    yield "entropy", scores.entropy_T, x.seg.spread(x.seg.valid_GK)


def sides(x: HeadInput, terms: Sequence[Term]) -> tuple[Tensor, Tensor]:
    """Which responses count as chosen and as rejected: two disjoint bool masks (G, K); of labelled groups all that are
    desirable and all that are not, otherwise at most one in a group each."""
    valid_GK = x.seg.valid_GK
    if x.label is not None and any(t.head.needs.layout in ("unpaired", "labelled") for t in terms):
        return valid_GK & (x.label_GK > 0), valid_GK & (x.label_GK < 0)
    K = valid_GK.shape[-1]
    index_K = torch.arange(K, device=valid_GK.device)
    by_order = x.reward is None or x.best_first
    rank_GK = (-index_K).expand_as(valid_GK).float() if by_order else x.reward_GK
    lowest_G = K - 1 - rank_GK.masked_fill(~valid_GK, torch.inf).flip(-1).argmin(-1)  # the last among equals
    rejected_GK = (index_K == lowest_G[:, None]) & valid_GK
    return x.best_GK, rejected_GK & ~x.best_GK


def _beta(terms: Sequence[Term]) -> float:
    betas = [t.head.beta for t in terms if hasattr(t.head, "beta")]
    return float(betas[0]) if betas else 1.0


def _rewards(
    x: HeadInput, implied_GK: Tensor, chosen_GK: Tensor, rejected_GK: Tensor, is_set: bool
) -> Iterator[Metric]:
    both_G = chosen_GK.any(-1) & rejected_GK.any(-1)
    margin_G = masked_mean(implied_GK, chosen_GK) - masked_mean(implied_GK, rejected_GK)
    yield "rewards/chosen", implied_GK, chosen_GK
    yield "rewards/rejected", implied_GK, rejected_GK
    yield "rewards/margins", margin_G, both_G
    yield "rewards/accuracies", _won(margin_G), both_G
    yield "rewards/ties", margin_G == 0, both_G
    if is_set and x.reward is not None:
        valid_GKK = x.seg.valid_GK[:, :, None] & x.seg.valid_GK[:, None, :]
        above_GKK = (x.reward[:, :, None] > x.reward[:, None, :]) & valid_GKK
        yield "sets/accuracy", _won(implied_GK[:, :, None] - implied_GK[:, None, :]), above_GKK


def _won(margin: Tensor) -> Tensor:
    return (margin > 0).float() + 0.5 * (margin == 0).float()


def _heads(x: HeadInput, terms: Sequence[Term], parts: Parts) -> Iterator[Metric]:
    valid_GK = x.seg.valid_GK
    masks = {m.shape: m for m in (x.seg.spread(valid_GK), valid_GK, valid_GK.any(-1))}  # T == G reads as groups
    for name, out, counts in zip(names(terms), parts.outputs, parts.masks):
        yield f"loss/{name}", out.loss, counts
        for metric, values in out.metrics.items():
            label = metric.split("/", 1)[-1]
            yield f"{name}/{label}", values, counts if values.shape == counts.shape else masks[values.shape]
