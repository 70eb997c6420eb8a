"""`po reward strength`: how strongly models that did not see a pair agree with its label.

Each of M members cuts the prompts into K folds of its own and trains K models, each on all folds but one, which then
judges that one. So every pair gets M margins r(chosen) - r(rejected), none from a model that was trained on the pair or
on another of the same prompt. `data_prep/repair.py strength` mends labels by them.

Wang et al. 2024, Secrets of RLHF in Large Language Models Part II: Reward Modeling, arXiv:2401.06080. Unverified:
whether their ten models judged what they were trained on; a model remembers such labels, right or wrong.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from po.data.groups import Groups
from po.data.read import Record
from po.data.store import light
from po.errors import StoppedError, UserError
from po.policy import load_tokenizer
from po.prep.inputs import open_inputs
from po.prep.partial import check_output
from po.prep.rows import ScoredSet, read_set
from po.prep.step import Outcome, run_step
from po.process import arguments, quiet, say
from po.reward_model.data import load_pairs
from po.reward_model.run import make
from po.reward_model.spec import RewardRecipe
from po.spec import Source

_SILENT = {"save_strategy": "no", "eval_strategy": "no", "logging_strategy": "no", "report_to": "none"}
_NO_EVAL: dict[str, Any] = {"eval_on_start": False, "load_best_model_at_end": False, "disable_tqdm": True}


@dataclass(frozen=True)
class Judge:
    """One model of the ensemble: the pairs that it is trained on and those that it judges."""

    member: int
    fold: int
    trained: tuple[int, ...]
    held: tuple[int, ...]


def judges(prompts: Sequence[str], folds: int, members: int, seed: int) -> list[Judge]:
    """The ensemble for pairs with these prompts. Pairs of one prompt are always in one fold."""
    found = []
    for member in range(members):
        lot = {p: hashlib.sha256(f"{seed} {member} {p}".encode()).digest() for p in prompts}
        fold_of = {p: n % folds for n, p in enumerate(sorted(lot, key=lambda p: lot[p]))}
        for fold in range(folds):
            held = tuple(i for i, p in enumerate(prompts) if fold_of[p] == fold)
            trained = tuple(i for i, p in enumerate(prompts) if fold_of[p] != fold)
            found.append(Judge(member, fold, trained, held))
    return found


def strength(recipe: RewardRecipe, output: Path, force: bool = False, notes: Sequence[str] = ()) -> None:
    """Train the ensemble and write the training rows with `margins`, one of each member.

    What a model has judged is kept in OUTPUT.members/: a run that was killed trains only what is missing.
    """
    quiet()
    for note in notes:
        say(f"note: {note}")
    _check(recipe, output, force)
    recipe = replace(recipe, data=replace(recipe.data, eval=()), train={**recipe.train, **_SILENT, **_NO_EVAL})
    tokenizer = load_tokenizer(recipe.model)
    pairs = load_pairs(recipe, tokenizer)
    say("\n".join(pairs.lines))
    places = _places(pairs.train)
    prompts = _prompts(recipe.data.train)
    different = len({prompts[p] for p in places})
    if different < recipe.ensemble.folds:
        raise UserError(f"ensemble.folds: expected at most {different}, the number of prompts")
    folder = output.with_name(f"{output.name}.members")
    folder.mkdir(parents=True, exist_ok=True)
    what = asdict(replace(recipe, output_dir="", data=replace(recipe.data, train=(), cache_dir=None)))
    key = hashlib.sha256(json.dumps([what, pairs.prepared[0].key], sort_keys=True, default=dict).encode()).hexdigest()
    margins: dict[str, list[float]] = {p: [] for p in places}
    for judge in judges([prompts[p] for p in places], recipe.ensemble.folds, recipe.ensemble.members, recipe.seed):
        found = _judged(judge, recipe, tokenizer, pairs.train, places, folder, key)
        for i in judge.held:
            margins[places[i]].append(found[places[i]])
    options = {"recipe": what, "rows": pairs.prepared[0].key}
    run_step(
        "reward strength",
        recipe.data.train,
        output,
        WithMargins(recipe.data.train[0], margins),
        options=options,
        max_bad=recipe.data.max_bad,
        force=force,
    )


def _check(recipe: RewardRecipe, output: Path, force: bool) -> None:
    """Raises UserError, before anything is trained, for what would fail afterwards."""
    if recipe.deepspeed is not None or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("po reward strength: its models are trained one after the other in one process, without ranks")
    if output.exists() and not force:
        raise UserError(f"{output}: is there already; name another output, or overwrite it with --force")
    check_output(output)
    if len({repr(replace(source, path="")) for source in recipe.data.train}) > 1:
        raise UserError(
            "data.train: po reward strength reads sources with the same options; make one file of them first"
        )


def _places(groups: Groups) -> list[str]:
    """Where each pair's row stands, file:line: what tells rows apart also where two have one id."""
    examples = light(groups.examples)
    for item in groups.items:
        e = examples[item.example]
        if not e.is_pair:
            raise UserError(
                f"po reward strength: {e.where}: expected pairs, found answers with rewards; data_prep/pair.py makes "
                "pairs of them"
            )
    return [examples[item.example].where for item in groups.items]


def _prompts(sources: Sequence[Source]) -> dict[str, str]:
    """A hash of each row's prompt, by where the row stands."""
    found = {}
    for one in open_inputs(sources):
        for record in one.records():
            read = read_set(record, one.source) if record.data is not None else ()
            if isinstance(read, ScoredSet):
                said = json.dumps(read.row.prompt, default=dict, sort_keys=True)
                found[record.where] = hashlib.sha256(said.encode()).hexdigest()
    return found


def _judged(
    judge: Judge, recipe: RewardRecipe, tokenizer: Any, rows: Groups, places: Sequence[str], folder: Path, key: str
) -> Mapping[str, float]:
    """The margins of the pairs that one model is to judge, from disk where they are there."""
    path = folder / f"{judge.member}-{judge.fold}.json"
    name = f"member {judge.member + 1}, fold {judge.fold + 1}"
    if path.is_file() and (kept := json.loads(path.read_text("utf-8")))["key"] == key:
        say(f"{name}: found in {path}")
        margins: dict[str, float] = kept["margins"]
        return margins
    say(f"{name}: training on {len(judge.trained)} pairs, judging {len(judge.held)}")
    number = judge.member * recipe.ensemble.folds + judge.fold
    one = replace(recipe, output_dir=str(folder / "scratch"), seed=(recipe.seed + number) % 2**32)
    part = Groups(rows.examples, [rows.items[i] for i in judge.trained])
    args = arguments(one.plain)
    made = make(one, args, tokenizer, part, None, key, folder)
    made.trainer.train()
    if made.stop.stopped:
        raise StoppedError(f"stopped on request in {name}; the same command goes on with the models before it")
    found = made.trainer.judge(Groups(rows.examples, [rows.items[i] for i in judge.held]))
    margins = {places[i]: j.margin for i, j in zip(judge.held, found, strict=True)}
    del made
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    said = {"key": key, "trained": [places[i] for i in judge.trained], "margins": margins}
    staged = path.with_suffix(".tmp")
    staged.write_text(json.dumps(said), "utf-8")
    staged.replace(path)
    return margins


@dataclass(frozen=True)
class WithMargins:
    """The work of the step that writes the rows."""

    source: Source
    margins: Mapping[str, Sequence[float]]

    def __call__(self, record: Record) -> Outcome:
        """The pair with its margins."""
        read = read_set(record, self.source)
        if isinstance(read, tuple):
            return Outcome(problem=read)
        found = self.margins.get(record.where)
        if found is None:
            return Outcome(dropped="too long, empty or identical, so not judged")
        against = {"pairs whose strength is below 0": float(sum(found) < 0)}
        return Outcome((read.as_pair(0, 1, margins=list(found)),), sums=against)
