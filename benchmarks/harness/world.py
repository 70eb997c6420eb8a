"""The sandbox as the benchmarks use it: scored answers, held-out questions and the base model, loaded once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from po.sandbox import Pretraining, Sandbox, Size, build, reward, sample
from po.sandbox.sampling import Conversation, Sample
from po.sandbox.store import find

Row = Mapping[str, Any]  # {"id", "prompt": messages, "responses": [{"content", "reward"}]}


@dataclass(frozen=True)
class World:
    """A finished sandbox, read. Rows are its training questions with their scored answers."""

    folder: Path
    key: str
    questions: int = 96  # held-out ones that are asked in an evaluation
    pairs: int = 64  # rows whose best and worst answers' log-probs are followed

    @cached_property
    def model(self) -> Any:
        """The base model, which nobody changes."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.folder / "model", dtype=torch.float32).eval()

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder / "model")

    @cached_property
    def train(self) -> list[Row]:
        """The training rows that have at least two different answers (a base this small sometimes repeats itself)."""
        return [r for r in _read(self.folder / "train.jsonl") if len({a["content"] for a in r["responses"]}) > 1]

    @cached_property
    def held_out(self) -> list[Conversation]:
        """Questions for evaluation: none of their facts occur in the training rows or in the corpus."""
        return [r["prompt"] for r in _read(self.folder / "held_out.jsonl")][: self.questions]

    @cached_property
    def watched(self) -> list[tuple[Conversation, str, str]]:
        """(question, best answer, worst answer) of rows that nobody trains on, ties left out."""
        rows = (r for r in _read(self.folder / "eval.jsonl") if len(r["responses"]) > 1)
        ordered = [(r["prompt"], sorted(r["responses"], key=lambda a: -a["reward"])) for r in rows]
        return [(p, a[0]["content"], a[-1]["content"]) for p, a in ordered if a[0]["reward"] > a[-1]["reward"]][
            : self.pairs
        ]

    def encode(self, prompt: Conversation, answer: str) -> Sample:
        """Token ids of a question and an answer, EOS included, as the chat template renders them."""
        ids = self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        whole = [*prompt, {"role": "assistant", "content": answer}]
        both = self.tokenizer.apply_chat_template(whole, return_dict=False)
        assert both[: len(ids)] == ids, "the template does not render a question as the beginning of its answer"
        return Sample(answer, tuple(ids), tuple(both[len(ids) :]))

    def answers(self, prompts: Sequence[Conversation], count: int, seed: int) -> list[list[dict[str, Any]]]:
        """Scored answers that the base samples to each question; an empty one is left out."""
        found = sample(self.model, self.tokenizer, prompts, count, seed)
        return [
            [{"content": s.text, "reward": round(reward(p, s.text), 6)} for s in group if s.text]
            for p, group in zip(prompts, found)
        ]


def open_world(folder: Path) -> World:
    """The sandbox in a folder, of any size; where there is none, the default one is built (two minutes)."""
    found = _there(folder)
    if found is None:
        print(f"building the sandbox in {folder}: about two minutes on 2 cores", flush=True)
        found = build(folder)
    return World(found.folder, found.key)


def _there(folder: Path) -> Sandbox | None:
    try:
        said = json.loads((folder / "sandbox.json").read_text("utf-8"))
        size = Size(**{**said["size"], "pretraining": Pretraining(**said["size"]["pretraining"])})
        return find(folder, said["seed"], size)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
