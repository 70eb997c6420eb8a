"""The ordinal reward: a language model rates a completion, and its probabilities of the ratings are averaged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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


class Ordinal(Model):
    """The expected rating 1..S under the LM head's probabilities of the S rating tokens alone, in answer to a question.

    Learning Ordinal Probabilistic Reward from Preferences, arXiv:2602.12660. Unverified: how the paper asks; so the
    question is the recipe's.
    """

    def __init__(self, name: str, options: OrdinalOptions, device: str, where: str) -> None:
        super().__init__(name, options, device, where)
        if "{prompt}" not in options.template or "{completion}" not in options.template:
            raise UserError(f"{where}: options.template: expected {{prompt}} and {{completion}} in it")
        self._template = options.template
        ids_S = [self._rating(r, where) for r in options.ratings]
        if len(ids_S) < 2 or len(set(ids_S)) < len(ids_S):
            raise UserError(f"{where}: options.ratings: expected at least two different tokens, worst first")
        self._ids_S = torch.tensor(ids_S, device=device)
        with plainly():
            self._net: Any = load_frozen(self._spec).to(device)

    def _rating(self, rating: str, where: str) -> int:
        before = self._ids(self._question("?", "?"))
        whole = self._ids(self._question("?", "?") + rating)
        if whole[: len(before)] != before or len(whole) != len(before) + 1:
            raise UserError(
                f"{where}: options.ratings: {rating!r} is not one token after the question in this tokenizer"
            )
        return whole[-1]

    def _ids(self, text: str) -> tuple[int, ...]:
        ids, lead = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"]), self._encoder.lead
        return ids if ids[: len(lead)] == lead else lead + ids

    def _question(self, prompt: str, completion: str) -> str:
        asked = completion.join(part.replace("{prompt}", prompt) for part in self._template.split("{completion}"))
        if not self.tokenizer.chat_template:
            return asked
        talk = [{"role": "user", "content": asked}]
        return str(self.tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True))

    def encode(self, prompt: Any, completion: Any) -> Coded:
        """The question, and a rating as its answer: which one does not matter."""
        said = prompt if isinstance(prompt, str) else "\n\n".join(f"{m['role']}: {m.get('content')}" for m in prompt)
        return self._ids(self._question(said, text_of(completion))), (int(self._ids_S[0]),)

    def rewards(self, coded: Sequence[Coded]) -> list[float]:
        """From the log-probs of the ratings after each question."""
        want = Want(candidate_TM=self._ids_S.expand(len(coded), -1))
        logp_NS = score(self._net, laid_out(coded, self._device), want).candidate_TM
        assert logp_NS is not None
        return [float(x) for x in expected_ratings(logp_NS).tolist()]


def expected_ratings(logits_NS: Tensor) -> Tensor:
    """sum_s s p(s), s = 1..S, with p the softmax over the ratings alone. (N,) fp32 (float64 stays)."""
    logits_NS = logits_NS if logits_NS.dtype == torch.float64 else logits_NS.float()
    rating_S = torch.arange(1, logits_NS.shape[1] + 1, dtype=logits_NS.dtype, device=logits_NS.device)
    return (logits_NS.softmax(-1) * rating_S).sum(-1)
