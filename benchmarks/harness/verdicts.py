"""Real solutions with verdicts as off-policy rewards for a real, tiny model: `po train` on recipes of CoPG, TOPR and
A-LoL, then how much likelier right solutions to held-out questions are than wrong ones.

The solutions are four other models', so their own log-probs are not known; where TOPR wants those of the sampler it
gets the base model's, recomputed. A model of stories learns how solutions look whatever their verdicts, so
each loss has a control: the same with the verdicts dealt out at random within each question.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import yaml
from claims.lab import Finding, minus

from harness.derive import write
from harness.kept import once
from harness.stats import interval
from po.cli import main as po
from po.heads import HEADS
from po.sandbox.sampling import Sample, log_probs

DATA, MODEL = Path("data/gsm8k_solutions.jsonl.gz"), Path("models/stories260k")
TOKENS, HELD_OUT, STEPS, RATE = 320, 60, 40, 2e-4
SCORED, LABELLED = "scored", "labelled"  # the rows of a set head, of a head on single answers
SHUFFLED, RELABELLED = "shuffled", "relabelled"  # the same with verdicts dealt out at random within each question


Numbers = Mapping[str, Sequence[float]]  # by name, one for each question
Sides = Mapping[str, Numbers]  # of held-out and of trained questions


@dataclass(frozen=True)
class Case:
    """A loss and the rows that it reads."""

    name: str
    term: Mapping[str, Any]
    rows: str = SCORED
    reference: bool = True


CASES = (
    Case("CoPG", {"head": "copg", "beta": 0.1}),
    Case("TOPR", {"head": "topr", "length_normalize": True}, LABELLED, reference=False),
    Case("A-LoL", {"head": "a_lol", "epsilon": 0.9}),
    Case("CoPG, verdicts shuffled", {"head": "copg", "beta": 0.1}, SHUFFLED),
    Case("TOPR, verdicts shuffled", {"head": "topr", "length_normalize": True}, RELABELLED, reference=False),
    Case("A-LoL, verdicts shuffled", {"head": "a_lol", "epsilon": 0.9}, SHUFFLED),
)
CONTROLS = (SHUFFLED, RELABELLED)


@dataclass(frozen=True)
class Question:
    """A word problem with solutions in token ids and whether each is right: at least one is and one is not."""

    prompt: str
    solutions: tuple[str, ...]
    right: tuple[bool, ...]
    samples: tuple[Sample, ...]


def missing(shared: Path) -> Path | None:
    """What the benchmark cannot do without, if it is not there."""
    return next((shared / p for p in (DATA, MODEL) if not (shared / p).exists()), None)


def questions(shared: Path, tokenizer: Any) -> list[Question]:
    """Those with right and wrong solutions among the ones that fit; in the file's order."""
    found = []
    with gzip.open(shared / DATA, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    for row in rows:
        prompt = f"<s>{row['question']}\n"
        given = {s["solution"]: s["is_correct"] for s in row.values() if isinstance(s, dict)}
        kept = [(text, right, s) for text, right in given.items() if (s := _encode(tokenizer, prompt, text))]
        if len({right for _, right, _ in kept}) == 2:
            found.append(Question(prompt, *(tuple(x) for x in zip(*kept))))
    return found


def _encode(tokenizer: Any, prompt: str, text: str) -> Sample | None:
    """As po does: what is scored follows the longest prefix that the whole shares with the prompt, and EOS."""
    ids, whole = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (prompt, prompt + text))
    shared = next((i for i, (a, b) in enumerate(zip(ids, whole)) if a != b), len(ids))
    response = (*whole[shared:], tokenizer.eos_token_id)
    return Sample(text, tuple(ids[:shared]), response) if shared + len(response) <= TOKENS else None


def verdicts(
    shared: Path, out: Path, seeds: Sequence[int] = (0, 1, 2), steps: int = STEPS, held: int = HELD_OUT
) -> Finding:
    """Train each case on all but the last questions, and measure on those."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / MODEL)
    load = AutoModelForCausalLM.from_pretrained
    base = load(shared / MODEL, dtype=torch.float32).eval()
    asked = questions(shared, tokenizer)
    train, test = asked[:-held], asked[-held:]
    files = _files(out / "rows", train, base)
    finding = Finding(
        "Off-policy on real rows: verdicts on other models' solutions, a real model",
        "The methods ask for answers with a reward and not for who gave them: verdicts on solutions that other models "
        "wrote raise the margin between right and wrong ones.",
        _setting(train, test, steps),
        ("loss", "margin", "its change", "of which right", "wrong", "change per token", "change on trained questions"),
    )
    sides = {"held": test, "trained": train}
    before = {name: _margins(base, side) for name, side in sides.items()}
    got: dict[str, list[Sides]] = {case.name: [] for case in CASES}
    for seed in seeds:
        for case in CASES:

            def made(case: Case = case, seed: int = seed) -> Sides:
                model = _trained(case, shared, files, out, seed, steps)
                return {name: _margins(model, side) for name, side in sides.items()}

            parts = (case, seed, steps, held, TOKENS, RATE)
            after = once(out / "verdicts.jsonl", parts, HEADS[case.term["head"]], made)
            got[case.name].append({name: _moved(after[name], before[name]) for name in sides})
            print(f"{case.name} #{seed}: margin {mean(got[case.name][-1]['held']['change']):+.2f}", flush=True)
    finding.rows.append(("base", interval(before["held"]["margin"]).text(2), *[""] * 5))
    _report(finding, {name: [_over_seeds([run[side] for run in runs]) for side in sides] for name, runs in got.items()})
    return finding


def _report(finding: Finding, moved: Mapping[str, Sequence[Numbers]]) -> None:
    """A row for each case, and each loss against its control, by question. moved: on held-out and on trained ones."""
    for name, (held_out, trained) in moved.items():
        cells = [interval(held_out[n]).text(2) for n in ("margin", "change", "right", "wrong")]
        cells += [interval(held_out["per_token"]).text(4), interval(trained["change"]).text(2)]
        finding.rows.append((name, *cells))
    for name in (case.name for case in CASES if case.rows not in CONTROLS):
        for which, real, dealt in zip(("other", "trained"), moved[name], moved[f"{name}, verdicts shuffled"]):
            for what, n in (("margin", "change"), ("margin per token", "per_token")):
                said = f"{name}: {what} on {which} questions grows more than with verdicts shuffled"
                finding.expect(said, minus(real[n], dealt[n]))


def _over_seeds(runs: Sequence[Numbers]) -> dict[str, list[float]]:
    """Each question's mean."""
    return {name: [mean(x) for x in zip(*(run[name] for run in runs))] for name in runs[0]}


def _setting(train: Sequence[Question], test: Sequence[Question], steps: int) -> str:
    right, wrong = (sum(q.right.count(x) for q in train) for x in (True, False))
    return (
        f"stories260k (264,000 parameters, trained on children's stories), all weights, {steps} steps of 8 questions "
        f"(TOPR: 24 solutions), constant learning rate {RATE:g}, by `po train`. {len(train)} questions with {right} "
        f"right and {wrong} wrong solutions of four models, at most {TOKENS} tokens; questions whose solutions are all "
        "right or all wrong are left out. TOPR's sampler log-probs are the base model's own, recomputed: those of the "
        "four models are unknown. A-LoL's value is the share of a question's solutions that are right. Margin: the "
        "mean log pi of a question's right solutions less that of its wrong ones, nats per solution, on "
        f"{len(test)} questions that nobody trained on; then how far it, and each side, moved from the base. Intervals "
        "are 95 % over questions, of means over seeds. Shuffled: verdicts dealt out at random within each question."
    )


def _files(folder: Path, train: Sequence[Question], base: Any) -> dict[str, Path]:
    """Sets with the verdicts as rewards, the same with verdicts dealt out at random, and one row per solution."""
    rng = random.Random(0)
    made: dict[str, list[dict[str, Any]]] = {name: [] for name in (SCORED, LABELLED, *CONTROLS)}
    for i, q in enumerate(train):
        dealt = rng.sample(q.right, len(q.right))
        logps = [_token_logps(base, sample) for sample in q.samples]
        for scored, single, right in ((SCORED, LABELLED, q.right), (SHUFFLED, RELABELLED, dealt)):
            answers = [{"content": s, "reward": float(r)} for s, r in zip(q.solutions, right)]
            row = {"id": str(i), "prompt": q.prompt, "responses": answers, "value": mean(map(float, right))}
            made[scored].append(row)
            for k, (text, label) in enumerate(zip(q.solutions, right)):
                row = {"id": f"{i}.{k}", "prompt": q.prompt, "completion": text, "label": label, "logps": logps[k]}
                made[single].append(row)
    return {name: write(folder / f"{name}.jsonl", rows) for name, rows in made.items()}


@torch.no_grad()
def _token_logps(model: Any, sample: Sample) -> list[float]:
    ids = torch.tensor([sample.prompt_ids + sample.response_ids])
    logp_TV = model(input_ids=ids).logits[0, len(sample.prompt_ids) - 1 : -1].float().log_softmax(-1)
    return [min(0.0, x) for x in logp_TV.gather(-1, torch.tensor(sample.response_ids)[:, None])[:, 0].tolist()]


def recipe(case: Case, shared: Path, rows: Path, folder: Path, seed: int, steps: int) -> dict[str, Any]:
    """As YAML says it."""
    return {
        "model": {"name_or_path": str((shared / MODEL).resolve()), "dtype": "float32"},
        "reference": {"from": "init", "kind": "cached"} if case.reference else "none",
        "data": {"train": str(rows), "max_length": TOKENS},
        "loss": [dict(case.term)],
        "train": {
            "learning_rate": RATE,
            "lr_scheduler_type": "constant",
            "per_device_train_batch_size": 6
            if case.rows in (LABELLED, RELABELLED)
            else 2,  # small packs: attention is cheaper
            "gradient_accumulation_steps": 4,
            "max_steps": steps,
            "logging_steps": max(1, steps // 5),
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        },
        "seed": seed,
        "output_dir": str(folder / "run"),
    }


def _trained(case: Case, shared: Path, files: Mapping[str, Path], out: Path, seed: int, steps: int) -> Any:
    """`po train RECIPE`, in this process; the model that it wrote."""
    from transformers import AutoModelForCausalLM

    folder = out / "verdicts" / f"{case.term['head']}-{case.rows}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(case, shared, files[case.rows], folder, seed, steps)), "utf-8")
    said = open(folder / "output.txt", "w", encoding="utf-8")  # noqa: SIM115
    with said, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = po(["train", str(path)])
    if code:
        raise RuntimeError(f"po train {path} ended with exit code {code}: see {folder / 'output.txt'}")
    return AutoModelForCausalLM.from_pretrained(folder / "run", dtype=torch.float32).eval()


def _margins(model: Any, test: Sequence[Question]) -> dict[str, list[float]]:
    """For each question the mean log pi of its right and of its wrong solutions, and the difference; also per token."""
    logp = iter(log_probs(model, [s for q in test for s in q.samples]).tolist())
    out: dict[str, list[float]] = {"right": [], "wrong": [], "margin": [], "per_token": []}
    for q in test:
        own = [(next(logp), len(s.response_ids), right) for s, right in zip(q.samples, q.right)]
        side = {x: mean(lp for lp, _, right in own if right == x) for x in (True, False)}
        token = {x: mean(lp / n for lp, n, right in own if right == x) for x in (True, False)}
        out["right"].append(side[True])
        out["wrong"].append(side[False])
        out["margin"].append(side[True] - side[False])
        out["per_token"].append(token[True] - token[False])
    return out


def _moved(after: Numbers, before: Numbers) -> dict[str, list[float]]:
    """The margin of each question, and what became of all of it since `before`."""
    change = {name: [a - b for a, b in zip(after[name], before[name])] for name in after}
    return {**change, "change": change["margin"], "margin": list(after["margin"])}
