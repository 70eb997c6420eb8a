"""Embeddings of texts from a model folder: the mean of the last hidden state over a text's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from po.errors import UserError


@cache
def _loaded(folder: str) -> tuple[Any, Any, str]:
    """Model, tokenizer and device, once per process."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"--embedder: {folder} is no folder of a model (no config.json)")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    except (OSError, ValueError) as e:
        raise UserError(f"--embedder: {folder}: transformers cannot load it: {e}") from e
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.eval().to(device), tokenizer, device


def embed(texts: Sequence[str], folder: str, max_tokens: int = 512) -> list[list[float]]:
    """One list of numbers per text. Texts go one by one: neither padding nor company changes a number; longer ones lose
    their end; a text without tokens is an error of the tokenizer, ValueError."""
    import torch

    model, tokenizer, device = _loaded(folder)
    out = []
    for text in texts:
        ids = tokenizer(text, truncation=True, max_length=max_tokens)["input_ids"]
        if not ids:
            raise ValueError(f"the tokenizer of {folder} makes no token of {text[:40]!r}")
        with torch.inference_mode():
            hidden_1TD = model(torch.tensor([ids], device=device)).last_hidden_state
        out.append([float(x) for x in hidden_1TD[0].float().mean(0).cpu()])
    return out
