"""What a run left behind: its recipe, its weights, its tokenizer and the rows to try them on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from po.checkpoint import checkpoints, why_broken
from po.data.prepare import prepare
from po.data.rows import Example
from po.data.wanted import wanted
from po.errors import UserError
from po.policy import tokenizer_key
from po.recipe import load as load_recipe
from po.spec import ModelSpec, Recipe, Source
from po.weights import is_adapter, read_config

_RECIPE = "recipe.resolved.yaml"
_ROWS = 16  # held-out rows on which an export's drift is measured


@dataclass(frozen=True)
class Run:
    """A folder to export from."""

    folder: Path  # the run, or one of its checkpoints
    recipe_file: Path
    recipe: Recipe
    base: ModelSpec  # the model of the recipe, found from anywhere, and without its SFT adapter
    adapted: bool  # it trained an adapter
    sharded: bool  # it holds DeepSpeed's shards only


def find_run(folder: Path) -> Run:
    """A run folder or a checkpoint of one. UserError where it is neither, is not finished, or is broken."""
    recipe_file = next((p / _RECIPE for p in (folder, folder.parent) if (p / _RECIPE).is_file()), None)
    if recipe_file is None:
        raise UserError(f"{folder}: is not a run folder (no {_RECIPE} in it). Expected a recipe's output_dir")
    recipe, _ = load_recipe(recipe_file, [])
    if folder in checkpoints(folder.parent) and (broken := why_broken(folder)):
        raise UserError(f"{folder}: the checkpoint is broken: {broken}. Export another one")
    whole = is_adapter(folder) or any(folder.glob("model*.safetensors"))
    if not whole and not (folder / "latest").is_file():
        near = ", ".join(p.name for p in checkpoints(folder))
        hint = f"It has {near}: export one of these, or finish it with resume=true" if near else "Train it first"
        raise UserError(f"{folder}: the run has not finished: there are no weights in it. {hint}")
    base = replace(recipe.model, adapter=None)
    if is_adapter(folder):  # its configuration has the base's full path, whatever folder the run was started in
        found = read_config(folder).get("base_model_name_or_path")
        base = replace(base, name_or_path=found or base.name_or_path)
    return Run(
        folder, recipe_file, recipe, base, recipe.lora is not None or recipe.model.adapter is not None, not whole
    )


def tokenizer_of(run: Run) -> ModelSpec:
    """The tokenizer that the run saved, template included, else the recipe's."""
    for folder in (run.folder, run.folder.parent):
        if (folder / "tokenizer_config.json").is_file() and (folder / _RECIPE).is_file():
            return replace(run.base, tokenizer=str(folder), chat_template=None)
    return run.base


def held_out(run: Run, tokenizer: Any, eval_path: str | None) -> list[Example]:
    """A few rows of a file, else of the recipe's evaluation data, else of its training data."""
    spec = run.recipe.data
    sources = (Source(eval_path),) if eval_path else spec.eval or spec.train
    few = tuple(replace(s, limit=min(s.limit or _ROWS, _ROWS)) for s in sources)
    examples = prepare(spec, few, tokenizer, tokenizer_key(tokenizer), "export", wanted(run.recipe.loss)).examples
    if len(examples) == 0:
        raise UserError(f"{sources[0].path}: has no rows to compare log-probs on; give some with --eval FILE")
    return [examples[i] for i in range(min(_ROWS, len(examples)))]
