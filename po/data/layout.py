"""How heads see examples: pairs, sets, labelled responses or best ones; and whether the data has what heads need."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from itertools import combinations, pairwise

from po.data.mismatch import with_others
from po.data.rows import Example, Item
from po.data.store import light
from po.data.wanted import name_of
from po.errors import UserError
from po.spec import PairRule, Term
from po.types import Layout, Needs

Pairs = list[tuple[int, int]]  # better, worse


def arrange(
    examples: Sequence[Example], layout: Layout, rule: PairRule, margin: float | None, seed: int, mismatch: bool = False
) -> tuple[list[Item], str]:
    """Items of a layout in the order of the examples, and a line that says what was derived from what.

    pair: a pair as it is; of a set, pairs by `rule`. best_vs_random draws by seed and content, whatever the order of
    rows. Ties never make a pair. Raises UserError where nothing is left, or where `margin` does not go with the rule.
    mismatch: every item also gets a response of another row (po.data.mismatch).
    """
    _check_margin(rule, margin)
    examples = light(examples)
    items, line = items_of(examples, layout, rule, margin, seed)
    if not items:
        do = ". Choose another data.pairing" if layout == "pair" else ""
        raise UserError(f"the data gives nothing to train on: {line}{do}")
    return with_others(examples, items, seed) if mismatch else items, line


def items_of(
    examples: Sequence[Example], layout: Layout, rule: PairRule, margin: float | None, seed: int
) -> tuple[list[Item], str]:
    """As `arrange`, where nothing may be left as well."""
    match layout:
        case "pair":
            return _arrange_pairs(examples, rule, margin, seed)
        case "set":
            items = [Item(i, tuple(range(len(e.response_ids)))) for i, e in enumerate(examples)]
            line = f"{len(items)} sets of {_span(items)} responses"
        case "unpaired":
            items = [Item(i, (k,)) for i, e in enumerate(examples) for k in range(len(e.response_ids))]
            labels = [(examples[i.example].label or ())[i.responses[0]] for i in items]
            line = f"{len(items)} labelled responses: {labels.count(1)} desirable, {labels.count(-1)} undesirable"
        case "labelled":
            items = [Item(i, tuple(range(len(e.response_ids)))) for i, e in enumerate(examples)]
            labels = [label for e in examples for label in e.label or ()]
            line = (
                f"{len(items)} groups of {_span(items)} responses: {labels.count(1)} desirable, "
                f"{labels.count(-1)} undesirable, {labels.count(0)} unlabelled"
            )
        case "best":
            items = [Item(i, (k,)) for i, e in enumerate(examples) for k in _best(e)]
            left = len(examples) - len(items)
            line = f"the best response of {len(items)} rows" + (f"; {left} undesirable ones left out" if left else "")
    return items, line


def _check_margin(rule: PairRule, margin: float | None) -> None:
    if rule == "margin" and (margin is None or not math.isfinite(margin) or margin < 0):
        raise UserError(
            f"data.pairing_margin: with pairing: margin, expected the least difference of rewards, got {margin}"
        )
    if rule != "margin" and margin is not None:
        raise UserError(f"data.pairing_margin: only pairing: margin reads it; pairing is {rule}. Remove one of them")


def _span(items: Sequence[Item]) -> str:
    sizes = sorted(len(i.responses) for i in items)
    return "no" if not sizes else str(sizes[0]) if sizes[0] == sizes[-1] else f"{sizes[0]} to {sizes[-1]}"


def _best(e: Example) -> tuple[int, ...]:
    """The preferred response; (): a labelled row without a desirable one."""
    if e.is_pair:
        return (0,)
    if e.reward is not None:
        return (e.reward.index(max(e.reward)),)
    if e.label is not None:
        return (e.label.index(1),) if 1 in e.label else ()
    return (0,)


def _arrange_pairs(
    examples: Sequence[Example], rule: PairRule, margin: float | None, seed: int
) -> tuple[list[Item], str]:
    items: list[Item] = []
    given = sets = derived = ties = near = 0
    for i, e in enumerate(examples):
        if e.is_pair:
            given += 1
            items.append(Item(i, (0, 1)))
            continue
        sets += 1
        score = e.reward if e.reward is not None else e.label
        assert score is not None, "check_needs refuses rows without rewards or labels"
        wanted = pairs_of(score, rule, partial(_draw, e, seed=seed))
        found = [(a, b) for a, b in wanted if score[a] > score[b] and e.response_ids[a] != e.response_ids[b]]
        wide = [(a, b) for a, b in found if margin is None or score[a] - score[b] >= margin]
        ties, near, derived = ties + len(wanted) - len(found), near + len(found) - len(wide), derived + len(wide)
        items += [Item(i, pair) for pair in wide]
    said = [f"{given} pairs as given"] if given else []
    if sets:
        closer = f", {near} closer than {margin:g}" if margin is not None else ""
        said.append(f"{derived} pairs derived from {sets} sets by {rule} ({ties} ties{closer} made none)")
    return items, "; ".join(said) or "no rows"


def pairs_of(score: Sequence[float], rule: PairRule, lot: Callable[[int], bytes]) -> Pairs:
    """Candidate pairs of a set, ties among them: what is wanted, not yet what is distinct.

    lot: what best_vs_random draws by, for each response; the least wins.
    """
    order = sorted(range(len(score)), key=lambda k: -score[k])  # stable: the first among equals
    match rule:
        case "best_vs_worst":
            return [(order[0], order[-1])]
        case "best_vs_random":
            worse = [k for k in order if score[k] < score[order[0]]] or [order[-1]]
            return [(order[0], min(worse, key=lot))]
        case "adjacent":
            return list(pairwise(order))
        case "all" | "margin":
            return list(combinations(order, 2))


def _draw(e: Example, k: int, seed: int) -> bytes:
    """A response's lot: by seed and content, so that neither the order of rows nor of responses matters."""
    return hashlib.sha256(repr((seed, e.prompt_ids, e.response_ids[k])).encode()).digest()


def check_needs(
    terms: Sequence[Term], examples: Sequence[Example], where: str, sampled: bool = False, given: Collection[str] = ()
) -> Layout:
    """The batch layout for these terms. Raises UserError that names the head, its need and the first row without it.

    "best" adapts to the layout of the other terms. sampled: the examples are prompts, whose responses and all that
    belongs to these will be sampled; `given` are columns that come with the samples.
    """
    layouts = {t.head.needs.layout: t.head for t in terms if t.head.needs.layout != "best"}
    if len(layouts) > 1:
        named = " and ".join(f"{name_of(head)!r} ({layout})" for layout, head in layouts.items())
        raise UserError(f"{where}: heads {named} want different batches; one recipe trains on one layout")
    if not terms or not len(examples):
        raise UserError(f"{where}: expected at least one loss term and one row")
    layout: Layout = next(iter(layouts), "best")
    of_responses = () if sampled else tuple((t.head, *want) for t in terms for want in _wants(t.head.needs, layout))
    wants = [*of_responses, *((t.head, *want) for t in terms for want in _wants_of_prompt(t.head.needs, given))]
    for e in light(examples):
        for head, lacks, need, advice in wants:
            if lacks(e):
                do = advice or f"Score them, or use head {'dpo' if e.is_pair else 'sft'!r}."
                raise UserError(f"{where}: head {name_of(head)!r} needs {need}; {e.where} has none. {do}")
    return layout


def _wants(needs: Needs, layout: Layout) -> Iterator[tuple[Callable[[Example], bool], str, str]]:
    """(whether an example lacks it, what it is, what to do) for each need that data can fail; "": see check_needs."""
    if needs.reward:
        yield lambda e: e.reward is None, "a reward on every response", ""
    if needs.label or layout == needs.layout in ("unpaired", "labelled"):
        values = "true, false or null (unlabelled)" if layout == "labelled" else "true or false"
        yield lambda e: e.label is None, "a label on every response", f"Add label: {values} to them."
    if needs.behaviour:
        yield lambda e: e.logps is None, "the sampler's logps of every response", "Sample them again with log-probs."
    if needs.embedding:
        yield lambda e: e.embedding is None, "an embedding of every response", "Add embedding: [numbers] to them."
    if needs.teacher:
        do = "Add teacher: {ids, logps} to them."
        yield lambda e: e.teacher_ids is None, "a teacher's log-probs of every response", do
    if needs.teacher_ref:
        what, do = "the log-probs of the teacher's own reference", "Add ref_logps to `teacher`."
        yield lambda e: e.teacher_ref_logps is None, what, do
    for name in needs.response_columns:
        do = f"Add {name}: a number to them."
        yield partial(_lacks, name, "response_columns"), f"a number {name!r} of every response", do
    for name in needs.token_columns:
        do = f"Add {name}: a list of one number per token to them."
        yield partial(_lacks, name, "token_columns"), f"numbers {name!r} of every response's tokens", do
    if layout == needs.layout == "pair":
        yield _no_pair, "two responses with a preference", "Give rows chosen and rejected, or scored responses."
    if needs.group_size is not None:
        do = "Make such sets (data_prep/subset.py), or use a head for any number."
        yield lambda e: len(e.response_ids) != needs.group_size, f"sets of exactly {needs.group_size} responses", do
    elif layout == needs.layout == "set" and not needs.single:
        yield lambda e: len(e.response_ids) < 2, "a second response to every prompt", "Add one, or use head 'sft'."


def _wants_of_prompt(needs: Needs, given: Collection[str]) -> Iterator[tuple[Callable[[Example], bool], str, str]]:
    """The same for what belongs to a prompt."""
    if needs.prompt_embedding:
        do = "Add prompt_embedding: [numbers] to the rows."
        yield lambda e: e.prompt_embedding is None, "an embedding of the prompt", do
    if needs.privileged:
        do = "Add privileged_prompt to the rows: text, or messages where the prompt is."
        yield lambda e: e.privileged_ids is None, "a privileged prompt", do
    for name in [n for n in needs.columns if n not in given]:
        do = f"Add {name}: a number to the rows, or name their column in the source's `columns`."
        yield partial(_lacks, name, "columns"), f"a number in column {name!r}", do


def _lacks(name: str, columns: str, e: Example) -> bool:
    return all(name != given for given, _ in getattr(e, columns))


def _no_pair(e: Example) -> bool:
    return not e.is_pair and (len(e.response_ids) < 2 or (e.reward is None and e.label is None))
