"""A tiny real model, tokenizer and rows on disk, for tests that run the main job."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
import yaml

WORDS = [f"w{i}" for i in range(60)]


def make_model(folder: Path, seed: int = 0, **config: Any) -> Path:
    """A 2-layer llama of hidden size 32 with a word-level tokenizer (BOS in front), in Hugging Face files."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {w: i for i, w in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    ).save_pretrained(folder)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(vocabulary), **size | ids | config))
    model.save_pretrained(folder)
    return folder


def _words(rng: random.Random, low: int, high: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))


def write_pairs(path: Path, n: int, seed: int = 0) -> Path:
    """n rows of prompt, chosen, rejected."""
    rng = random.Random(seed)
    rows = [
        {
            "id": f"pair-{i}",
            "prompt": _words(rng, 2, 8) + " ",
            "chosen": _words(rng, 1, 6),
            "rejected": _words(rng, 1, 6),
        }
        for i in range(n)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def write_sets(path: Path, n: int, seed: int = 0) -> Path:
    """n rows of 2 to 4 responses with rewards."""
    rng = random.Random(seed)
    rows = [
        {
            "id": f"set-{i}",
            "prompt": _words(rng, 2, 8) + " ",
            "responses": [{"content": f"{_words(rng, 1, 6)} w{k}", "reward": rng.random()} for k in range(2 + i % 3)],
        }
        for i in range(n)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def write_recipe(path: Path, net: Path, rows: Path, out: Path, **changes: Any) -> Path:
    """A DPO + LoRA recipe in fp32; `changes` replace top-level sections, `train` is merged in."""
    train = {"learning_rate": 0.01, "per_device_train_batch_size": 4, "num_train_epochs": 1, "logging_steps": 1}
    recipe: dict[str, Any] = {
        "model": {"name_or_path": str(net), "dtype": "float32"},
        "lora": {"r": 4, "alpha": 8},
        "data": {"train": str(rows), "cache_dir": str(path.parent / "cache")},
        "reference": {"from": "init", "kind": "cached", "cache_dir": str(path.parent / "cache")},
        "loss": [{"head": "dpo", "beta": 0.5}],
        "output_dir": str(out),
        "train": train | {"save_strategy": "no", "disable_tqdm": True} | changes.pop("train", {}),
    }
    path.write_text(yaml.safe_dump(recipe | changes))
    return path
