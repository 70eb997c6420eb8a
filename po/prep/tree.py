"""SPaR: a failed answer is refined in a small tree of critiques and rewritings, until a judge's majority passes one.

Cheng et al. 2024, SPaR: Self-Play with Tree-Search Refinement to Improve Instruction-Following, arXiv:2412.11605.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from po.data.read import Record
from po.prep.asking import (
    Left,
    Rounds,
    answered,
    as_text,
    complete,
    plain,
    read_answers,
    said,
    say,
    settled,
    written,
)
from po.prep.chat import Answer, Ask
from po.prep.contrast import Sampling, after, contrast, one_text
from po.prep.prompts import Prompt
from po.prep.revise import fitted
from po.prep.rows import ScoredSet
from po.prep.search_prompts import SPAR_JUDGE, SPAR_REFINE
from po.prep.verdicts import Vote
from po.spec import Source

Order = Literal["bfs", "dfs"]


@dataclass(frozen=True)
class Node:
    """An answer in the tree. The root has the value 0, whatever the judge said of it."""

    text: str
    critique: str | None  # None: passed, or nothing to go on with
    value: float = 0.0
    depth: int = 0


@dataclass
class _Tree:
    """One search as it goes on: what it is about, what it may still try, which answers it has seen."""

    task: str
    left: int
    seen: set[str]
    nodes: int = 0


@dataclass(frozen=True)
class Spar:
    """The work of one row: every answer that the majority fails is a root; of a pair only the rejected one.

    Unverified: what the budget counts, that a tie leaves an answer out, that equal values go by age.
    """

    source: Source
    model: str  # as `chosen_source`
    verdicts: int = 5
    branch: int = 3
    keep: int = 2
    depth: int = 3
    gate: float = 0.5
    order: Order = "bfs"
    budget: int = 15  # answers that one search may try
    per_prompt: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    judge: Prompt = SPAR_JUDGE
    refine: Prompt = SPAR_REFINE

    def __call__(self, record: Record) -> Rounds:
        """Rounds of requests, and at their end the Outcome."""
        return settled(read_answers(record, self.source), self._rows)

    def _rows(self, read: ScoredSet, counts: Counter[str]) -> Generator[list[Ask], list[Answer], list[dict[str, Any]]]:
        task = as_text(read.row)
        places = [1] if read.row.chosen_first else range(len(read.answers))
        texts = {k: text for k in places if (text := said(read.answers[k]["content"]))}
        if not texts:
            raise Left("no answer that is one text")
        votes = yield from self._judged(task, list(texts.values()), counts)
        negatives = self._negatives(dict(zip(texts, votes)), counts)
        rows = []
        for k, vote in negatives:
            found, tree = yield from self._search(task, Node(texts[k], vote.critique), counts)
            counts["searches"] += 1
            if found is not None:
                rows.append(self._row(read, k, vote, found, tree))
        counts["searches that found an answer"] += len(rows)
        if not rows:
            raise Left("no refinement passed")
        return rows

    def _negatives(self, votes: dict[int, Vote], counts: Counter[str]) -> list[tuple[int, Vote]]:
        """The answers to begin with; Left where there is none."""
        kinds = {k: _kind(vote) for k, vote in votes.items()}
        counts.update(f"answers {kind}" for kind in kinds.values())
        found = [(k, vote) for k, vote in votes.items() if kinds[k] == "failed"]
        if not found:
            raise Left("no answer that the majority fails")
        if self.per_prompt is not None and len(found) > self.per_prompt:
            counts["failed answers beyond --per-prompt"] += len(found) - self.per_prompt
        return found[: self.per_prompt]

    def _row(self, read: ScoredSet, k: int, vote: Vote, found: Node, tree: _Tree) -> dict[str, Any]:
        text = fitted(found.text, one_text(read, k))
        better = {"content": written(read.row, text), "source": self.model, "value": found.value}
        worse = plain(read.answers[k], value=vote.value)
        how = {"nodes": tree.nodes, "depth": found.depth}
        made = contrast(read, "spar", better, worse, (self.judge, self.refine), **how)
        return {**made, "id": f"{read.row.id}/{k}-spar"}

    def _search(
        self, task: str, root: Node, counts: Counter[str]
    ) -> Generator[list[Ask], list[Answer], tuple[Node | None, _Tree]]:
        """The best of the first accepted answers, None where there is none, and the tree."""
        tree = _Tree(task, self.budget, {root.text.strip()})
        todo: list[list[Node]] = [[root]]  # what is expanded together, the next at the end
        while todo and tree.left:
            children = yield from self._children(tree, todo.pop(), counts)
            accepted = [c for c in children if c.value > self.gate]
            if accepted:
                return max(accepted, key=lambda c: c.value), tree
            fine = sorted((c for c in children if c.depth < self.depth), key=lambda c: -c.value)[: self.keep]
            if self.order == "bfs":
                todo += [fine] if fine else []
            else:
                todo += [[c] for c in reversed(fine)]
        if todo:
            counts["searches ended by the budget"] += 1
        return None, tree

    def _children(
        self, tree: _Tree, parents: Sequence[Node], counts: Counter[str]
    ) -> Generator[list[Ask], list[Answer], list[Node]]:
        """Refinements of some nodes, judged; those that neither pass nor have a critique are removed."""
        asks, of = [], []
        for parent in parents:
            n = min(self.branch, tree.left)
            if n:
                tree.left -= n
                of.append(parent)
                asks.append(self._refinements(tree.task, parent, n))
        replies = yield from complete(asks)
        fresh = []
        for parent, reply in ((p, r) for p, some in zip(of, replies, strict=True) for r in some.replies):
            tree.nodes += 1
            counts["nodes"] += 1
            try:
                text = after(self.refine.marker, reply)
            except Left as e:
                counts[f"nodes removed: {e}"] += 1
                continue
            if text in tree.seen:
                counts["nodes removed: seen before"] += 1
                continue
            tree.seen.add(text)
            fresh.append((parent, text))
        votes = yield from self._judged(tree.task, [text for _, text in fresh], counts)
        children = []
        for (parent, text), vote in zip(fresh, votes, strict=True):
            value = vote.value
            if value is None or (value <= self.gate and vote.critique is None):
                counts["nodes removed: no critique"] += 1
                continue
            children.append(Node(text, vote.critique, value, parent.depth + 1))
        return children

    def _judged(
        self, task: str, texts: Sequence[str], counts: Counter[str]
    ) -> Generator[list[Ask], list[Answer], list[Vote]]:
        asks = [self.sampling.ask(say(self.judge.fill(task=task, answer=t)), n=self.verdicts) for t in texts]
        votes = [Vote.of(one) for one in (yield from answered(asks))]
        counts["verdicts"] += sum(v.yes + v.no + v.unread for v in votes)
        counts["verdicts not readable"] += sum(v.unread for v in votes)
        return votes

    def _refinements(self, task: str, node: Node, n: int) -> Ask:
        filled = self.refine.fill(task=task, answer=node.text, critique=str(node.critique))
        return self.sampling.ask(say(filled), n=n)


def _kind(vote: Vote) -> str:
    if vote.value is None:
        return "without a readable verdict"
    if vote.value == 0.5:
        return "with a tie"
    if vote.value > 0.5:
        return "passed"
    return "failed" if vote.critique is not None else "failed without a critique"
