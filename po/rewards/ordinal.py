"""The ordinal reward: a language model rates a completion, and its probabilities of the ratings are averaged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from po.data.tokenize import Encoder
from po.errors import UserError
from po.logprob import Want, score
from po.policy import load_frozen, plainly
from po.rewards.cells import text_of
from po.rewards.models import Coded, Model, Scoring, laid_out


@dataclass(frozen=True, kw_only=True)
class OrdinalOptions(Scoring):
    """Options of kind: ordinal."""

    template: str  # the question, with {prompt} and {completion}; a user message where there is a chat template
    ratings: tuple[str, ...] = tuple("123456789")  # worst first; each must be one token


class Question:
    """What the model is asked about an answer, and the token ids of the ratings that may follow."""

    def __init__(self, template: str, ratings: Sequence[str], encoder: Encoder, where: str) -> None:
        """where: what is at fault in messages, e.g. rollout.rewards[0].options. Raises UserError for what is unfit."""
        if "{prompt}" not in template or "{completion}" not in template:
            raise UserError(f"{where}.template: expected {{prompt}} and {{completion}} in it")
        self._template, self._encoder = template, encoder
        self.rating_S = tuple(self._rating(r, where) for r in ratings)
        if len(self.rating_S) < 2 or len(set(self.rating_S)) < len(self.rating_S):
            raise UserError(f"{where}.ratings: expected at least two different tokens, worst first")

    def __call__(self, prompt: Any, completion: Any) -> tuple[int, ...]:
        """Token ids of the question about one completion, up to where the rating stands."""
        said = prompt if isinstance(prompt, str) else "\n\n".join(f"{m['role']}: {m.get('content')}" for m in prompt)
        return self._ids(self._text(said, text_of(completion)))

    def _rating(self, rating: str, where: str) -> int:
        before = self._ids(self._text("?", "?"))
        whole = self._ids(self._text("?", "?") + rating)
        if whole[: len(before)] != before or len(whole) != len(before) + 1:
            raise UserError(f"{where}.ratings: {rating!r} is not one token after the question in this tokenizer")
        return whole[-1]

    def _ids(self, text: str) -> tuple[int, ...]:
        ids, lead = tuple(self._encoder.tokenizer(text, add_special_tokens=False)["input_ids"]), self._encoder.lead
        return ids if ids[: len(lead)] == lead else lead + ids

    def _text(self, prompt: str, completion: str) -> str:
        asked = completion.join(part.replace("{prompt}", prompt) for part in self._template.split("{completion}"))
        if not self._encoder.tokenizer.chat_template:
            return asked
        talk = [{"role": "user", "content": asked}]
        return str(self._encoder.tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True))


class Ordinal(Model):
    """The expected rating 1..S under the LM head's probabilities of the S rating tokens alone, in answer to a question.

    Learning Ordinal Probabilistic Reward from Preferences, arXiv:2602.12660. Unverified: how the paper asks; so the
    question is the recipe's.
    """

    def __init__(self, name: str, options: OrdinalOptions, device: str, where: str) -> None:
        super().__init__(name, options, device, where)
        self._question = Question(options.template, options.ratings, self._encoder, f"{where}: options")
        with plainly():
            self._net: Any = load_frozen(self._spec).to(device)

    def encode(self, prompt: Any, completion: Any) -> Coded:
        """The question, and a rating as its answer: which one does not matter."""
        return self._question(prompt, completion), self._question.rating_S[:1]

    def rewards(self, coded: Sequence[Coded]) -> list[float]:
        """From the log-probs of the ratings after each question."""
        logp_NS = ratings_of(self._net, [question for question, _ in coded], self._question.rating_S, self._device)
        return [float(x) for x in expected_ratings(logp_NS).tolist()]


def ratings_of(net: Any, questions: Sequence[tuple[int, ...]], rating_S: tuple[int, ...], device: Any) -> Tensor:
    """log p of the ratings alone after each question, (N, S) fp32 (float64 of a float64 model), with gradient."""
    want = Want(candidate_TM=torch.tensor(rating_S, device=device).expand(len(questions), -1))
    logp_NS = score(net, laid_out([(q, rating_S[:1]) for q in questions], device), want).candidate_TM
    assert logp_NS is not None
    return logp_NS.log_softmax(-1)


def expected_ratings(logits_NS: Tensor) -> Tensor:
    """sum_s s p(s), s = 1..S, with p the softmax over the ratings alone. (N,) fp32 (float64 stays)."""
    logits_NS = logits_NS if logits_NS.dtype == torch.float64 else logits_NS.float()
    rating_S = torch.arange(1, logits_NS.shape[1] + 1, dtype=logits_NS.dtype, device=logits_NS.device)
    return (logits_NS.softmax(-1) * rating_S).sum(-1)
