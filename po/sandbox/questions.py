"""A small world whose truth is known: name so many things of this kind and so many of that.

    Name three fruits and two tools.      ->      plum, fig, apple, saw, drill.

The reward compares the words of an answer with what was asked by intersection over union; every word that is not the
first mention of a thing still asked for is an error:

    reward = hits / (words + asked - hits)

asked = how many things the question wants, words = all words of the answer, hits = distinct things named of each wanted
kind, at most as many as are wanted. It lies in [0, 1], and

  - it is 1 only for an answer that names exactly what was asked, and 0 for one that names nothing of it;
  - striking out a repetition, a thing too many, a thing of another kind or any other word raises it, unless it is 0;
  - naming every thing there is earns asked / 120, under 0.08.

So neither length nor repetition buys reward.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from po.errors import UserError

KINDS: Mapping[str, tuple[str, ...]] = {
    kind: tuple(things.split())
    for kind, things in {
        "fruit": "apple pear plum cherry lemon grape peach melon mango fig lime banana",
        "animal": "dog cat horse cow sheep goat pig rabbit mouse lion tiger bear",
        "tool": "hammer saw drill wrench chisel file pliers axe shovel rake ladder screwdriver",
        "color": "red blue green yellow purple pink brown black white grey violet scarlet",
        "drink": "water milk tea coffee juice beer wine cider cocoa lemonade soda rum",
        "vehicle": "car bus train truck bicycle boat ship plane tram van taxi wagon",
        "garment": "shirt coat hat sock shoe glove scarf skirt dress belt boot jacket",
        "instrument": "piano guitar violin drum flute harp trumpet cello banjo organ tuba oboe",
        "bird": "robin eagle crow swan owl hawk raven finch heron stork dove wren",
        "tree": "oak pine birch maple willow cedar elm spruce ash poplar larch palm",
    }.items()
}
_NUMBERS = ("one", "two", "three", "four", "five")
_FORMS = ("Name {}.", "List {}.", "Give me {}.", "Can you name {}?")
_RAMBLES = (
    "well, let me think. {}",
    "i would say {}",
    "that is easy: {} i hope that helps.",
    "{} that is my answer.",
    "good question. maybe {} i am not sure.",
)
_CARELESS = 0.55  # share of demonstrations by a careless author, who makes each sort of fault half the time

Wanted = tuple[tuple[str, int], ...]  # kinds and how many of each


@dataclass(frozen=True)
class Question:
    """What is asked, as facts; `text` is what a model reads."""

    wanted: Wanted
    form: str = _FORMS[0]

    @property
    def text(self) -> str:
        """The question in words."""
        parts = [f"{_NUMBERS[n - 1]} {kind}{'s' * (n > 1)}" for kind, n in self.wanted]
        return self.form.format(", ".join(parts[:-1]) + " and " + parts[-1])

    @property
    def facts(self) -> frozenset[tuple[str, int]]:
        """What makes two questions the same: neither wording nor order."""
        return frozenset(self.wanted)

    @property
    def messages(self) -> list[dict[str, str]]:
        """The question as a conversation."""
        return [{"role": "user", "content": self.text}]


@dataclass(frozen=True)
class World:
    """What one seed generates. No question occurs, in any wording, in two of the sets or in a set and the corpus."""

    seed: int
    train: tuple[Question, ...]
    eval: tuple[Question, ...]
    held_out: tuple[Question, ...]

    def corpus(self) -> Iterator[tuple[str, str]]:
        """Endless (question, demonstration) pairs for pretraining, good and sloppy ones mixed."""
        rng = random.Random(f"corpus {self.seed}")
        taken = {q.facts for q in (*self.train, *self.eval, *self.held_out)}
        while True:
            question = _question(rng)
            if question.facts not in taken:
                yield question.text, demonstration(question, rng)


def world(seed: int, train: int = 400, eval: int = 64, held_out: int = 256) -> World:
    """The world of a seed: questions to train on, to evaluate on during training and to hold out, and its corpus."""
    if train + eval + held_out > 2000:
        raise UserError(
            f"sandbox world: got {train} + {eval} + {held_out} questions, expected at most 2000 in all: there are 4365 "
            "different ones, and the corpus needs the rest. Ask for fewer."
        )
    rng = random.Random(f"questions {seed}")
    drawn: dict[frozenset[tuple[str, int]], Question] = {}
    while len(drawn) < train + eval + held_out:
        question = _question(rng)
        drawn.setdefault(question.facts, question)
    questions = tuple(drawn.values())
    return World(seed, questions[:train], questions[train : train + eval], questions[train + eval :])


def _question(rng: random.Random) -> Question:
    kinds = rng.sample(list(KINDS), rng.choice((2, 3)))
    most = {2: 5, 3: 3}[len(kinds)]
    return Question(tuple((kind, rng.randint(1, most)) for kind in kinds), rng.choice(_FORMS))


def demonstration(question: Question, rng: random.Random) -> str:
    """An answer as the corpus has it. A careful author gives a right one; a careless author may miscount a kind, name
    things of other kinds, repeat and ramble, each independently of the others."""
    careless = rng.random() < _CARELESS

    def fault() -> bool:
        return careless and rng.random() < 0.5

    named: list[str] = []
    for kind, n in question.wanted:
        named += rng.sample(KINDS[kind], n + rng.choice((-1, 1, 2)) if fault() else n)
    if not named or fault():
        strays = [rng.choice(KINDS[rng.choice(list(KINDS))]) for _ in range(rng.choice((1, 2)))]
        _scatter(named, strays, rng)
    if fault():
        _scatter(named, [rng.choice(named) for _ in range(rng.choice((1, 2, 3)))], rng)
    answer = ", ".join(named) + "."
    return rng.choice(_RAMBLES).format(answer) if fault() else answer


def _scatter(named: list[str], more: Sequence[str], rng: random.Random) -> None:
    for thing in more:
        named.insert(rng.randint(0, len(named)), thing)


def wanted(prompt: str | Sequence[Mapping[str, str]]) -> Wanted:
    """What a prompt asks for, read from its text. Raises UserError where it is not a question of this world."""
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    parts = re.findall(rf"({'|'.join(_NUMBERS)}) ({'|'.join(KINDS)})s?\b", text)
    if not parts:
        raise UserError(
            f"sandbox reward: prompt: got {text!r}, expected a question like 'Name three fruits and two tools.' "
            "Score other prompts with a reward of their own."
        )
    return tuple((kind, _NUMBERS.index(number) + 1) for number, kind in parts)


def reward(prompt: str | Sequence[Mapping[str, str]], response: str) -> float:
    """The true score of an answer, in [0, 1]; the head of this file says what it measures.

    prompt: the question's text, or a conversation whose last message is the question.
    Raises UserError where the prompt is not a question of this world.
    """
    asked = wanted(prompt)
    words = re.findall(r"[^\s,.]+", response)
    hits = sum(min(n, len(set(words).intersection(KINDS[kind]))) for kind, n in asked)
    return hits / (len(words) + sum(n for _, n in asked) - hits)
