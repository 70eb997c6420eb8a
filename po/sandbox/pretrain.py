"""The sandbox's base model: a tokenizer and a small Llama, trained from nothing on the world's corpus."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from po.sandbox.questions import World

BOS, EOS, PAD, USER, ASSISTANT = "<|bos|>", "<|eos|>", "<|pad|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}<|user|> {{ m['content'] }}"
    "{% elif m['role'] == 'assistant' %}<|assistant|> {{ m['content'] }}{{ eos_token }}"
    "{% else %}{{ raise_exception('the sandbox model knows the roles user and assistant') }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class Pretraining:
    """How large the base model is and how long it learns. The default has 1.1 M parameters."""

    hidden_size: int = 128
    intermediate_size: int = 512
    layers: int = 4
    heads: int = 8
    vocab_size: int = 1024  # at most
    steps: int = 1400
    batch: int = 16  # demonstrations in a step
    learning_rate: float = 2e-3


@contextmanager
def two_threads() -> Iterator[None]:
    """Compute on at most two threads: more only wait for each other on a model this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(2, before))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train_tokenizer(world: World, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a chat template, trained on the first demonstrations of the corpus."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pairs = itertools.islice(world.corpus(), 3000)
    tokenizer.train_from_iterator((f" {text}" for pair in pairs for text in pair), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
    )


def pretrain(
    world: World, how: Pretraining, progress: Callable[[int, float], None] = lambda step, loss: None
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Train tokenizer and model on the CPU: next-token loss on the answers, AdamW, a cosine schedule.

    The same world, CPU and number of threads give the same weights. progress(step, loss in nats per token), each step.
    """
    tokenizer = train_tokenizer(world, how.vocab_size)
    with two_threads(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(world.seed)
        model = LlamaForCausalLM(_config(how, tokenizer))
        optimizer = torch.optim.AdamW(model.parameters(), lr=how.learning_rate, betas=(0.9, 0.95), weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _cosine(step, how.steps))
        batches = itertools.islice(_batches(world, tokenizer, how.batch), how.steps)
        for step, (input_ids, labels) in enumerate(batches, 1):
            loss = model(input_ids=input_ids, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            progress(step, loss.item())
    return model.eval(), tokenizer


def _config(how: Pretraining, tokenizer: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=how.hidden_size,
        intermediate_size=how.intermediate_size,
        num_hidden_layers=how.layers,
        num_attention_heads=how.heads,
        num_key_value_heads=how.heads,
        max_position_embeddings=256,
        initializer_range=0.06,  # a model this narrow learns much faster than from the usual 0.02
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _cosine(step: int, steps: int) -> float:
    """Learning-rate factor: a linear rise over a twentieth of the steps, then half a cosine down to a twentieth."""
    rise = max(1, steps // 20)
    if step < rise:
        return (step + 1) / rise
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def _batches(world: World, tokenizer: Any, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Padded (input_ids, labels), each (batch, longest); only answers and their EOS carry labels."""
    corpus = world.corpus()
    assistant = tokenizer.convert_tokens_to_ids(ASSISTANT)
    while True:
        texts = [f"{BOS}{USER} {ask}{ASSISTANT} {answer}{EOS}" for ask, answer in itertools.islice(corpus, size)]
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
        input_ids = batch["input_ids"]
        is_assistant = (input_ids == assistant).long()
        answer = (is_assistant.cumsum(1) - is_assistant).bool() & batch["attention_mask"].bool()
        yield input_ids, input_ids.masked_fill(~answer, -100)
