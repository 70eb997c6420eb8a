"""Sampling answers and scoring their tokens with a plain Hugging Face model, a batch of prompts at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Conversation = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Sample:
    """One sampled answer and the tokens it was made of."""

    text: str
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]  # EOS included, unless max_new_tokens came first


@torch.no_grad()
def sample(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Conversation],
    K: int,
    seed: int,
    max_new_tokens: int = 64,
    batch_size: int = 64,
    progress: Callable[[int], None] = lambda done: None,
) -> list[list[Sample]]:
    """K answers to each prompt at temperature 1, nothing cut off the distribution: (prompts, K).

    Two models get the same random numbers from the same seed. The global random state is left as it was.
    progress(prompts done) is called after each batch.
    """
    out: list[list[Sample]] = []
    with torch.random.fork_rng(devices=[]):
        for start in range(0, len(prompts), batch_size):
            torch.manual_seed(seed + start)
            out += _sample_batch(model, tokenizer, prompts[start : start + batch_size], K, max_new_tokens)
            progress(len(out))
    return out


def _sample_batch(
    model: Any, tokenizer: Any, prompts: Sequence[Conversation], K: int, max_new_tokens: int
) -> list[list[Sample]]:
    texts = [tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True) for p in prompts]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    produced = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        num_return_sequences=K,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )[:, inputs["input_ids"].shape[1] :]
    samples = []
    for row, response in enumerate(produced.tolist()):
        ids, mask = inputs["input_ids"][row // K], inputs["attention_mask"][row // K].bool()
        ended = response.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in response else len(response)
        said = response[: ended - (response[ended - 1] == tokenizer.eos_token_id)]
        text = tokenizer.decode(said, skip_special_tokens=False).strip()  # a stray special token is a word like any
        samples.append(Sample(text, tuple(ids[mask].tolist()), tuple(response[:ended])))
    return [samples[i : i + K] for i in range(0, len(samples), K)]


@torch.no_grad()
def log_probs(model: Any, samples: Sequence[Sample], batch_size: int = 128) -> Tensor:
    """log pi(response | prompt) in nats, summed over the response's tokens, by a plain padded forward. (samples,)"""
    sums = []
    for start in range(0, len(samples), batch_size):
        batch = samples[start : start + batch_size]
        whole = [torch.tensor(s.prompt_ids + s.response_ids) for s in batch]
        input_ids = torch.nn.utils.rnn.pad_sequence(whole, batch_first=True)
        at = torch.arange(input_ids.shape[1])
        lengths = torch.tensor([[len(s.prompt_ids), len(s.prompt_ids) + len(s.response_ids)] for s in batch])
        logits = model(input_ids=input_ids, attention_mask=(at < lengths[:, 1:]).long()).logits[:, :-1]
        logp = logits.float().log_softmax(-1).gather(-1, input_ids[:, 1:, None])[..., 0]
        response = (at >= lengths[:, :1]) & (at < lengths[:, 1:])
        sums.append(torch.where(response[:, 1:], logp, 0).sum(-1))
    return torch.cat(sums)
