"""Sums of two-digit numbers with a verifier, and a tiny model that was shown too few, some of them wrong."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"
LONGEST = 4  # tokens of an answer: three digits and EOS


@dataclass(frozen=True)
class Schooling:
    """How the base learns. wrong: share of demonstrations whose answer has one digit replaced."""

    hidden_size: int = 64
    layers: int = 2
    shown: int = 2000  # different sums among the demonstrations; there are 8100
    wrong: float = 0.3
    steps: int = 1000
    batch: int = 64
    learning_rate: float = 2e-3
    train: int = 4000  # further sums, to train on by reward
    held_out: int = 1000
    seed: int = 0


@dataclass(frozen=True)
class Sum:
    prompt: str  # 47+38=
    answer: str  # 85


def sums(how: Schooling) -> tuple[list[Sum], list[Sum], list[Sum]]:
    """(shown, train, held out): no sum is in two of them."""
    every = [Sum(f"{a}+{b}=", str(a + b)) for a in range(10, 100) for b in range(10, 100)]
    random.Random(f"sums {how.seed}").shuffle(every)
    ends = how.shown, how.shown + how.train, how.shown + how.train + how.held_out
    assert ends[-1] <= len(every), f"{ends[-1]} of {len(every)} sums"
    return every[: ends[0]], every[ends[0] : ends[1]], every[ends[1] : ends[2]]


@dataclass(frozen=True)
class Task:
    """On disk: the base model, prompts with answers as rows, and the sums that are held out."""

    folder: Path
    held_out: Sequence[Sum]

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def rows(self) -> Path:
        return self.folder / "train.jsonl"

    def base(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32).eval()

    def passes(self, model: Any) -> dict[str, float]:
        """pass: mean probability that a sample at temperature 1 is the answer (a number written otherwise, 085, is left
        out, so this is a lower bound, by a hair). greedy: share of sums whose likeliest tokens are the answer."""
        found = probabilities(model, AutoTokenizer.from_pretrained(self.model), self.held_out)
        return {"pass": found[0].mean().item(), "greedy": found[1].double().mean().item()}


def open_task(folder: Path, how: Schooling, say: Callable[[str], None] = print) -> Task:
    """The task in a folder, made there unless it is."""
    shown, train, held_out = sums(how)
    task, stamp = Task(folder, held_out), folder / "schooling.json"
    key = {**asdict(how), "torch": torch.__version__, "code": hashlib.sha256(Path(__file__).read_bytes()).hexdigest()}
    if stamp.is_file() and json.loads(stamp.read_text("utf-8")) == key:
        return task
    say(f"teaching a base in {folder}: half a minute")
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = characters()
    tokenizer.save_pretrained(task.model)
    school(how, shown, tokenizer).save_pretrained(task.model)
    lines = (json.dumps({"id": s.prompt, "prompt": s.prompt, "answer": s.answer}) + "\n" for s in train)
    task.rows.write_text("".join(lines), "utf-8")
    stamp.write_text(json.dumps(key), "utf-8")
    return task


def characters() -> PreTrainedTokenizerFast:
    """A token for each digit and sign."""
    vocab = {token: i for i, token in enumerate([PAD, BOS, EOS, *"0123456789+="])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, vocab[BOS])])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD)


def school(how: Schooling, shown: Sequence[Sum], tokenizer: Any) -> LlamaForCausalLM:
    """A llama taught from nothing, with next-token loss on answers and their EOS."""
    rng = random.Random(f"demonstrations {how.seed}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(how.seed)
        model = LlamaForCausalLM(_config(how, tokenizer))
        optimizer = torch.optim.AdamW(model.parameters(), lr=how.learning_rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, how.steps)
        for _ in range(how.steps):
            said = [Sum(s.prompt, _spoilt(s.answer, rng, how.wrong)) for s in rng.choices(shown, k=how.batch)]
            input_ids, labels = _batch(said, tokenizer)
            model(input_ids=input_ids, labels=labels).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return model.eval()


def _spoilt(answer: str, rng: random.Random, share: float) -> str:
    """The answer, or with one of its digits replaced."""
    if rng.random() >= share:
        return answer
    at = rng.randrange(len(answer))
    return answer[:at] + rng.choice([d for d in "0123456789" if d != answer[at]]) + answer[at + 1 :]


def _config(how: Schooling, tokenizer: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=how.hidden_size,
        intermediate_size=4 * how.hidden_size,
        num_hidden_layers=how.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=32,
        initializer_range=0.06,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _batch(said: Sequence[Sum], tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Padded (input_ids, labels); all prompts are of one length."""
    ids = [torch.tensor([*tokenizer(s.prompt + s.answer)["input_ids"], tokenizer.eos_token_id]) for s in said]
    input_ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id)
    labels = input_ids.masked_fill(input_ids == tokenizer.pad_token_id, -100)
    labels[:, : len(tokenizer(said[0].prompt)["input_ids"])] = -100
    return input_ids, labels


@torch.no_grad()
def probabilities(model: Any, tokenizer: Any, asked: Sequence[Sum]) -> tuple[torch.Tensor, torch.Tensor]:
    """(probability of the answer and its EOS, whether all of its tokens are the likeliest), for each sum."""
    input_ids, labels = _batch(asked, tokenizer)
    logp = model(input_ids=input_ids).logits[:, :-1].float().log_softmax(-1)
    counted, wanted = labels[:, 1:] != -100, labels[:, 1:].clamp_min(0)
    chosen = logp.gather(-1, wanted[..., None])[..., 0].where(counted, torch.zeros(()))
    return chosen.double().sum(-1).exp(), ((logp.argmax(-1) == wanted) | ~counted).all(-1)
