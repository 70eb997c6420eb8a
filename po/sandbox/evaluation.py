"""What training changed: true reward, win rate, KL and length on held-out questions, with 95 % intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from po.errors import UserError
from po.sandbox.pretrain import two_threads
from po.sandbox.questions import reward
from po.sandbox.sampling import Conversation, Sample, log_probs, sample


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval over questions (percentile bootstrap, 4000 resamples)."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class SideBySide:
    """One question and the first answer of either model to it."""

    prompt: str
    before: str
    after: str
    reward_before: float
    reward_after: float


@dataclass(frozen=True)
class Evaluation:
    """Before: the base model. After: the trained one. Both gave K answers to every question, from the same seed."""

    questions: int
    K: int
    reward_before: Estimate
    reward_after: Estimate
    exact_before: Estimate  # share of answers with reward 1
    exact_after: Estimate
    win_rate: Estimate  # of an answer after against one before, over all K x K pairs of a question; a tie is a half
    kl_sequence: Estimate  # mean of log pi - log ref over the trained model's own answers, nats per answer
    kl_token: Estimate  # the same per token
    length_before: Estimate  # tokens of an answer, EOS included
    length_after: Estimate
    samples: tuple[SideBySide, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def load(model: Path, adapter: Path) -> tuple[Any, Any, Any]:
    """(base, base with adapter, tokenizer), by transformers and PEFT alone, fp32 on the CPU."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not (adapter / "adapter_config.json").is_file():
        raise UserError(
            f"{adapter}: expected an exported adapter, found none. Make it with: po export {adapter.parent} --adapter"
        )
    base, below = (AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32) for _ in range(2))
    return base.eval(), PeftModel.from_pretrained(below, adapter).eval(), AutoTokenizer.from_pretrained(model)


def evaluate(
    base: Any,
    policy: Any,
    tokenizer: Any,
    prompts: Sequence[Conversation],
    K: int = 4,
    seed: int = 1,
    shown: int = 3,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Evaluation:
    """Sample K answers to each prompt from both models with the same seed, and compare them by the true reward."""

    def answers(model: Any, what: str) -> list[list[Sample]]:
        return sample(model, tokenizer, prompts, K, seed, progress=lambda done: progress(what, done, len(prompts)))

    with two_threads():
        before = answers(base, "sampling from the base")
        after = answers(policy, "sampling from the trained model")
        flat = [s for group in after for s in group]
        logratio_GK = (log_probs(policy, flat) - log_probs(base, flat)).view(-1, K)
    before_GK, after_GK = _rewards(prompts, before), _rewards(prompts, after)
    length_GK = _lengths(after)
    wins_G = _wins(before_GK, after_GK)
    return Evaluation(
        questions=len(prompts),
        K=K,
        reward_before=estimate(before_GK.mean(1)),
        reward_after=estimate(after_GK.mean(1)),
        exact_before=estimate((before_GK == 1).double().mean(1)),
        exact_after=estimate((after_GK == 1).double().mean(1)),
        win_rate=estimate(wins_G),
        kl_sequence=estimate(logratio_GK.double().mean(1)),
        kl_token=estimate(logratio_GK.double().sum(1), length_GK.sum(1)),
        length_before=estimate(_lengths(before).mean(1)),
        length_after=estimate(length_GK.mean(1)),
        samples=tuple(_side(p, b[0], a[0]) for p, b, a in zip(prompts[:shown], before, after)),
    )


def estimate(x_G: Tensor, per_G: Tensor | None = None, seed: int = 0, resamples: int = 4000) -> Estimate:
    """Mean of x_G, or sum of x_G over sum of per_G, with the 2.5 % and 97.5 % points of a bootstrap over questions."""
    per_G = torch.ones_like(x_G) if per_G is None else per_G
    chosen = torch.randint(len(x_G), (resamples, len(x_G)), generator=torch.Generator().manual_seed(seed))
    drawn = x_G[chosen].sum(1) / per_G[chosen].sum(1)
    low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=drawn.dtype)).tolist()
    return Estimate((x_G.sum() / per_G.sum()).item(), low, high)


def _rewards(prompts: Sequence[Conversation], answers: Sequence[Sequence[Sample]]) -> Tensor:
    rewards = [[reward(p, s.text) for s in group] for p, group in zip(prompts, answers)]
    return torch.tensor(rewards, dtype=torch.float64)


def _lengths(answers: Sequence[Sequence[Sample]]) -> Tensor:
    return torch.tensor([[len(s.response_ids) for s in group] for group in answers], dtype=torch.float64)


def _wins(before_GK: Tensor, after_GK: Tensor) -> Tensor:
    gap_GKK = after_GK[:, :, None] - before_GK[:, None, :]
    return ((gap_GKK > 0).double() + 0.5 * (gap_GKK == 0).double()).mean((1, 2))


def _side(prompt: Conversation, before: Sample, after: Sample) -> SideBySide:
    text = prompt[-1]["content"]
    return SideBySide(text, before.text, after.text, reward(text, before.text), reward(text, after.text))
