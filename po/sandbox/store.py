"""A sandbox on disk: model, rows and held-out questions of one seed, made once and reused while nothing changed."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from po.errors import UserError
from po.sandbox.pretrain import Pretraining, pretrain, two_threads
from po.sandbox.questions import Question, World, reward, world
from po.sandbox.sampling import Conversation, sample

Progress = Callable[[str, int, int], None]  # (what is being done, how much of it is done, how much there is)
_MANIFEST = "sandbox.json"
_ROWS = ("train", "eval", "held_out")
_CODE = ("questions.py", "pretrain.py", "sampling.py", "store.py")
_PACKAGES = ("torch", "transformers", "tokenizers")


@dataclass(frozen=True)
class Size:
    """How large a sandbox is. The default takes under two minutes on two CPU cores."""

    train: int = 768  # questions
    eval: int = 64
    held_out: int = 256
    responses: int = 4  # to each question of train and eval
    pretraining: Pretraining = field(default_factory=Pretraining)


@dataclass(frozen=True)
class Sandbox:
    """A finished sandbox."""

    folder: Path
    model: Path  # for AutoModelForCausalLM and AutoTokenizer
    train: Path  # rows: {"id", "prompt": messages, "responses": [{"content", "reward"}]}
    eval: Path
    held_out: Path  # {"id", "prompt"}: questions that neither the rows nor the corpus ask
    key: str  # of everything that decides the content

    def prompts(self) -> list[Conversation]:
        """The held-out questions."""
        return [json.loads(line)["prompt"] for line in self.held_out.read_text("utf-8").splitlines()]

    def manifest(self) -> dict[str, Any]:
        """Seed, size, versions, the base model's reward on the training questions, and a hash of every file."""
        found: dict[str, Any] = json.loads((self.folder / _MANIFEST).read_text("utf-8"))
        return found


def _at(folder: Path, key: str) -> Sandbox:
    train, eval, held_out = (folder / f"{name}.jsonl" for name in _ROWS)
    return Sandbox(folder, folder / "model", train, eval, held_out, key)


def _content(seed: int, size: Size) -> dict[str, Any]:
    here = Path(__file__).parent
    code = {name: hashlib.sha256((here / name).read_bytes()).hexdigest() for name in _CODE}
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"seed": seed, "size": asdict(size), "versions": versions, "code": code}


def find(out: Path, seed: int, size: Size) -> Sandbox | None:
    """The sandbox in a folder, if it is the one that `build` would make and none of its files has changed since."""
    key = _hash(_content(seed, size))
    try:
        manifest = json.loads((out / _MANIFEST).read_text("utf-8"))
        sound = manifest["key"] == key and manifest["files"] == _hashes(out)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return _at(out, key) if sound else None


def build(
    out: Path,
    seed: int = 0,
    size: Size | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Sandbox:
    """Make the sandbox of a seed in a folder, or find it there.

    Writes over an earlier sandbox, deletes nothing. Raises UserError where the folder holds anything else.
    """
    size = size or Size()
    if (found := find(out, seed, size)) is not None:
        return found
    if out.exists() and not (out / _MANIFEST).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(
            f"{out}: expected a new folder or an earlier sandbox, found something else; give another with --out"
        )
    out.mkdir(parents=True, exist_ok=True)
    content = _content(seed, size)
    _write_manifest(out, {"key": "unfinished", **content})
    sandbox = _at(out, _hash(content))
    this = world(seed, size.train, size.eval, size.held_out)
    steps = size.pretraining.steps
    model, tokenizer = pretrain(
        this, size.pretraining, lambda step, loss: progress(f"pretraining, loss {loss:.2f}", step, steps)
    )
    model.save_pretrained(sandbox.model)
    tokenizer.save_pretrained(sandbox.model)
    mean = _write_rows(sandbox, this, model, tokenizer, size.responses, progress)
    summary = {"parameters": model.num_parameters(), "mean_reward": round(mean, 4)}
    _write_manifest(out, {"key": sandbox.key, **content, **summary, "files": _hashes(out)})
    return sandbox


def _write_rows(sandbox: Sandbox, this: World, model: Any, tokenizer: Any, responses: int, progress: Progress) -> float:
    """Sample, score and write; returns the mean reward of the training rows."""
    total = len(this.train) + len(this.eval)
    questions = (*this.train, *this.eval)
    with two_threads():
        sampled = sample(
            model,
            tokenizer,
            [q.messages for q in questions],
            K=responses,
            seed=this.seed,
            progress=lambda done: progress("sampling", done, total),
        )
    rows = [_row(q, [s.text for s in samples]) for q, samples in zip(questions, sampled)]
    _write_jsonl(sandbox.train, rows[: len(this.train)], "train")
    _write_jsonl(sandbox.eval, rows[len(this.train) :], "eval")
    _write_jsonl(sandbox.held_out, [{"prompt": q.messages} for q in this.held_out], "held-out")
    return statistics.fmean(r["reward"] for row in rows[: len(this.train)] for r in row["responses"])


def _row(question: Question, answers: Sequence[str]) -> dict[str, Any]:
    """A set. An empty answer is left out: no trainer takes one, and it would say nothing about content."""
    responses = [{"content": a, "reward": round(reward(question.text, a), 6)} for a in answers if a]
    return {"prompt": question.messages, "responses": responses}


def _write_jsonl(path: Path, rows: Sequence[dict[str, Any]], name: str) -> None:
    lines = (json.dumps({"id": f"{name}-{i}", **row}) + "\n" for i, row in enumerate(rows))
    path.write_text("".join(lines), "utf-8")


def _write_manifest(out: Path, manifest: dict[str, Any]) -> None:
    staged = out / f"{_MANIFEST}.tmp"
    staged.write_text(json.dumps(manifest, indent=2) + "\n", "utf-8")
    staged.replace(out / _MANIFEST)


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _hashes(out: Path) -> dict[str, str]:
    """SHA-256 of what a sandbox consists of; files that others added to the folder do not matter."""
    paths = [*sorted((out / "model").iterdir()), *(out / f"{n}.jsonl" for n in _ROWS)]
    return {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}
