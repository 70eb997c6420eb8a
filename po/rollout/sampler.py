"""What a sampler of responses is: prompts of token ids in, responses with their log-probs out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: from softmax(logits / temperature), cut to the top_k likeliest tokens (0: all) and
    then to the fewest of these that hold top_p of the probability. temperature 0: always the likeliest token."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        assert self.max_tokens > 0, self
        assert self.temperature >= 0, self
        assert 0 < self.top_p <= 1, self
        assert self.top_k >= 0, self

    @property
    def logp_temperature(self) -> float:
        """What the logits of recorded log-probs are divided by: the temperature, and 1 where it is 0."""
        return self.temperature or 1.0


class Sampled(NamedTuple):
    """One response.

    ids: its tokens, with the stop token where it ended. logps: of each of them, under softmax(logits / temperature)
    over the whole vocabulary (before top_k and top_p; temperature 0: at temperature 1), in fp32. ended: whether a stop
    token ended it, rather than max_tokens.
    """

    ids: tuple[int, ...]
    logps: tuple[float, ...]
    ended: bool


class Sampler(Protocol):
    def sample(
        self, prompts: Sequence[tuple[int, ...]], n: int | Sequence[int], seeds: Sequence[int]
    ) -> list[list[Sampled]]:
        """For every prompt its n (or its own number of) samples: a function of the weights, the prompt, its n and its
        seed, up to rounding, whatever other prompts are in the call."""
        ...

    def update(self, model: Any) -> None:
        """The weights of `model` have changed: from now on samples are drawn from these."""
        ...


def counts(prompts: Sequence[tuple[int, ...]], n: int | Sequence[int]) -> list[int]:
    """How many samples each prompt gets."""
    each = [n] * len(prompts) if isinstance(n, int) else list(n)
    assert len(each) == len(prompts), f"{len(each)} numbers of samples for {len(prompts)} prompts"
    assert all(k >= 0 for k in each), each
    assert all(prompts), "a prompt without tokens"
    return each
