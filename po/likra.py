"""`po likra`: two adapters on one base, one trained on right and one on wrong answers, judge multiple-choice questions.

Paper: Hamdan and Yuret 2025, How much do LLMs learn from negative examples?, arXiv:2503.14391.

    score(y) = log p_positive(y | x) - log p_negative(y | x),    summed over the answer's tokens; the highest score wins

Both adapters are trained by `sft`, the negative one on wrong answers. Beside the ratio the table has what its parts do
alone: the base model, the positive adapter, and the base against the negative adapter.

Rows are those that po trains on: a prompt and its answers, of which the right one has the highest reward, the label
true, or the name `chosen`. Answers are scored as the tokens that training would score, EOS included.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from po.batch import Collate
from po.data.prepare import prepare
from po.data.rows import Example, Item
from po.errors import NumericsError, UserError
from po.finished import Run, find_run, tokenizer_of
from po.logprob import score
from po.policy import load_frozen, load_tokenizer, tokenizer_key
from po.sharing import problem, share
from po.spec import Source
from po.weights import fingerprint

_TOKENS = {"cuda": 16384, "cpu": 4096}  # of one forward


@dataclass(frozen=True)
class Accuracy:
    """Share of questions whose right answer has the highest score, with its 95 % interval (Wilson). A question with m
    answers at the top counts 1/m where the right one is among them: what guessing between them gives."""

    name: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Likra:
    """What each way of scoring got right. chance: what guessing would."""

    questions: int
    chance: float
    accuracies: tuple[Accuracy, ...]

    def table(self) -> str:
        """For people."""
        width = max(len(a.name) for a in self.accuracies)
        lines = [f"{a.name:<{width}}  {a.value:7.1%}  {a.low:6.1%} to {a.high:6.1%}" for a in self.accuracies]
        head = f"{'score':<{width}}  correct  95 % interval"
        return "\n".join([head, *lines, f"{self.questions} questions; guessing gets {self.chance:.1%}"])


def evaluate(positive: Path, negative: Path, rows: str) -> Likra:
    """Score the rows with the adapters of two finished runs, one after the other on their common base.

    Raises UserError where a run trained no adapter or is unfinished, the bases or tokenizers differ, or a row does not
    say which of its answers is right; NumericsError where a log-prob is not finite.
    """
    runs = [_adapted(folder) for folder in (positive, negative)]
    tokenizers = [load_tokenizer(tokenizer_of(run)) for run in runs]
    _check_same(runs, [tokenizer_key(t) for t in tokenizers])
    spec = replace(runs[0].recipe.data, overlong="drop", max_dropped=1.0, max_bad=0.0)
    prepared = prepare(spec, (Source(rows),), tokenizers[0], tokenizer_key(tokenizers[0]), "likra")
    counts = prepared.report.counts
    if prepared.report.dropped or any(counts.get(f"responses_{k}", 0) for k in ("overlong", "identical", "empty")):
        raise UserError(
            f"{rows}: some answers are too long, empty or alike; all must stay\n{prepared.report.summary()}"
        )
    examples = prepared.examples
    right = [right_answer(e) for e in examples]
    (base, pos), (_, neg) = (_scores(run, examples, with_base=run is runs[0]) for run in runs)
    ways = {"base": (base, None), "positive": (pos, None), "base - negative": (base, neg)}
    return Likra(
        len(right),
        sum(1 / len(e.response_ids) for e in examples) / len(right),
        tuple(_accuracy(name, a, b, right) for name, (a, b) in (ways | {"positive - negative": (pos, neg)}).items()),
    )


def _adapted(folder: Path) -> Run:
    run = find_run(folder)
    if not run.adapted:
        raise UserError(f"{folder}: this run trained all weights; expected one that trained an adapter (`lora: {{}}`)")
    if run.sharded:
        raise UserError(f"{folder}: holds DeepSpeed's shards only; give the finished run's folder")
    return run


def _check_same(runs: Sequence[Run], tokenizers: Sequence[str]) -> None:
    first, second = runs
    marks = [fingerprint(r.base.name_or_path, r.base.revision) for r in runs]
    if marks[0] != marks[1]:
        raise UserError(
            f"{second.folder}: its base {second.base.name_or_path!r} has other weights than "
            f"{first.base.name_or_path!r}, the base of {first.folder}. Expected two adapters of one model"
        )
    if tokenizers[0] != tokenizers[1]:
        raise UserError(
            f"{second.folder}: its tokenizer or chat template differs from that of {first.folder}, so the two would "
            "score different tokens. Train both with the same model.tokenizer and model.chat_template"
        )


def right_answer(e: Example) -> int:
    """Which answer of a row is right. UserError where it names none, or several."""
    marks: Sequence[float] = [0.0] * len(e.response_ids)
    if e.chosen_first or (e.reward is None and e.label is not None):
        marks = e.label or (1, -1)
    elif e.reward is not None:
        marks = e.reward
    best = [k for k, mark in enumerate(marks) if mark == max(marks)]
    if len(best) != 1 or len(marks) < 2:
        raise UserError(
            f"{e.where}: the answers marked as right are {best} of {len(marks)}; expected one among two or more: with "
            "the highest reward, the only label that is true, or as `chosen`"
        )
    return best[0]


def _scores(run: Run, examples: Sequence[Example], with_base: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Log-probs of the answers, (K,) per question, under the base (empty where not asked for) and with the adapter."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net: Any = load_frozen(replace(run.base, adapter=str(run.folder)))
    sharing = run.base.share_prefix is not False and problem(net.get_base_model(), run.recipe.data.max_length) is None
    if sharing:
        share(net.get_base_model())
    net = net if run.base.load_in_4bit else net.to(device)
    with_adapter = answer_logps(net, examples, sharing)
    if not with_base:
        return [], with_adapter
    with net.disable_adapter():
        return answer_logps(net, examples, sharing), with_adapter


@torch.no_grad()
def answer_logps(net: Any, examples: Sequence[Example], share_prefix: bool) -> list[Tensor]:
    """log p(answer | prompt), summed over its tokens, float64 on the CPU: (K,) per question."""
    device = next(net.parameters()).device
    collate = Collate(share_prefix)
    found: list[Tensor] = []
    for questions in _chunks(examples, share_prefix, _TOKENS.get(device.type, _TOKENS["cuda"])):
        rows = [(e, Item(i, tuple(range(len(e.response_ids)))), True) for i, e in enumerate(questions)]
        batch = collate(rows).to(device)
        logp_GK = batch.seg.sum(score(net, batch.stream).logp_T.double()).cpu()
        for e, logp_K in zip(questions, logp_GK):
            found.append(logp_K[: len(e.response_ids)])
            if not found[-1].isfinite().all():
                raise NumericsError(f"{e.where}: the log-probs of its answers are {found[-1].tolist()}; not all finite")
    return found


def _chunks(examples: Sequence[Example], share_prefix: bool, room: int) -> Iterator[list[Example]]:
    """Questions that fit one forward together; a longer one goes alone."""
    chunk: list[Example] = []
    used = 0
    for e in examples:
        answers = sum(len(r) for r in e.response_ids)
        tokens = answers + len(e.prompt_ids) * (1 if share_prefix else len(e.response_ids))
        if chunk and used + tokens > room:
            yield chunk
            chunk, used = [], 0
        chunk.append(e)
        used += tokens
    yield chunk


def _accuracy(name: str, plus: Sequence[Tensor], minus: Sequence[Tensor] | None, right: Sequence[int]) -> Accuracy:
    hits = 0.0
    for i, k in enumerate(right):
        score_K = plus[i] if minus is None else plus[i] - minus[i]
        top_K = score_K == score_K.max()
        hits += float(top_K[k]) / int(top_K.sum())
    return Accuracy(name, hits / len(right), *wilson(hits, len(right)))


def wilson(hits: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The score interval of a proportion: inside [0, 1], and wider than a point where all or none are right."""
    p, spread = hits / n, z * z / n
    centre = (p + spread / 2) / (1 + spread)
    half = math.sqrt(p * (1 - p) * spread + spread * spread / 4) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)
