"""NAT: trajectories after prompts that say how good they are.

Wang et al. 2024, Learning From Failure: Integrating Negative Examples when Fine-tuning Large Language Models as Agents,
arXiv:2402.11651. The texts are ours. The head `nat` raises the likelihood of all of them; inference uses the prompt of
the best class alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from po.data.messages import ASSISTANT
from po.data.prompts import Content
from po.data.read import Record
from po.prep.asking import Left, plain
from po.prep.contrast import apart
from po.prep.prompts import Prompt
from po.prep.rows import EVERYTHING, PROMPTS, ScoredSet, read_set
from po.prep.step import Outcome
from po.spec import Source

Place = Literal["end", "start"]


@dataclass(frozen=True)
class Tell:
    """prompts: one per class, the worst first. thresholds: the rewards above which the second, third, ... class begins;
    without them labels decide between two. inference: rows are prompts, and all are told the best class."""

    source: Source
    prompts: Sequence[Prompt]
    thresholds: Sequence[float] = ()
    place: Place = "end"
    inference: bool = False

    def __call__(self, record: Record) -> Outcome:
        """A row per answer; for inference one without answers."""
        read = read_set(record, self.source, PROMPTS if self.inference else EVERYTHING)
        if isinstance(read, tuple):
            return Outcome(problem=read)
        counts = Counter[str]()
        try:
            rows = (self._asked(read),) if self.inference else tuple(self._rows(read, counts))
        except Left as e:
            return Outcome(dropped=str(e), sums=counts)
        return Outcome(rows, "no label on any answer" if not rows else None, sums=counts)

    def _asked(self, read: ScoredSet) -> dict[str, Any]:
        """The prompt alone; what it had of answers goes."""
        fields, _ = apart(read.fields)
        return {**fields, **self._told(read, len(self.prompts) - 1)}

    def _rows(self, read: ScoredSet, counts: Counter[str]) -> Iterator[dict[str, Any]]:
        fields, sided = apart(read.fields)
        fields.pop("prompt_embedding", None)  # of the prompt as it was
        if sided:
            fields["original"] = {**fields.get("original", {}), **sided}
        many = len(read.answers) > 1
        for k, (answer, quality) in enumerate(zip(read.answers, self._classes(read))):
            if quality is None:
                counts["answers without a label"] += 1
                continue
            counts[f"answers: {self.prompts[quality].id}"] += 1
            kept = {k: v for k, v in answer.items() if k in ("reward", "ended")}
            one = plain(answer, **kept, label=quality == len(self.prompts) - 1)
            row_id = f"{read.row.id}/{k}" if many else read.row.id
            yield {**fields, "id": row_id, **self._told(read, quality), "completion": one.pop("content"), **one}

    def _classes(self, read: ScoredSet) -> list[int | None]:
        """The class of each answer; None without a label."""
        if self.thresholds:
            rewards = [r.reward for r in read.row.responses]
            if None in rewards:
                raise Left("no reward, which --thresholds need")
            return [sum(r > t for t in self.thresholds) for r in rewards if r is not None]
        if read.row.is_pair:
            return [1, 0]
        labels = [r.label for r in read.row.responses]
        if all(x is None for x in labels):
            raise Left("no label (rewards need --thresholds)")
        return [None if not x else int(x > 0) for x in labels]

    def _told(self, read: ScoredSet, quality: int) -> dict[str, Any]:
        prompt = self.prompts[quality]
        how = {"strategy": "nat", "prompts": [prompt.said]}
        return {"prompt": told(read.row.prompt, prompt.text, self.place), "contrast": how}


def told(prompt: Content, text: str, place: Place) -> Content | list[Mapping[str, Any]]:
    """A prompt with a text at the end or the start of what the user said last. Left where no user said anything."""
    if isinstance(prompt, str):
        body = prompt.rstrip()
        if body.endswith(ASSISTANT):
            body = body.removesuffix(ASSISTANT)
        return _with(body, text, place) + prompt[len(body) :]
    users = [i for i, m in enumerate(prompt) if m["role"] == "user"]
    if not users:
        raise Left("no user's message to say it in")
    last = prompt[users[-1]]
    return [
        *prompt[: users[-1]],
        {**last, "content": _with(str(last["content"]), text, place)},
        *prompt[users[-1] + 1 :],
    ]


def _with(said: str, text: str, place: Place) -> str:
    return f"{said}\n{text}" if place == "end" else f"{text}\n{said}"
