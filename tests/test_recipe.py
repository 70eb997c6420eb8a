"""Recipes: what a right one becomes, round trip, overrides, shorthands, the files in recipes/, the JSON schema."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from po.errors import UserError
from po.heads import HEADS
from po.heads.dpo import DPO
from po.heads.infonca import InfoNCA
from po.heads.ipo import IPO
from po.recipe import keep_checkpoints, load, resolved, resolved_text, schema, training_arguments
from po.recipe import text as recipe_text
from po.recipe.checks import name_of
from po.spec import LoraSpec, ModelSpec, Recipe, Source, Term
from po.zero import PRESETS, deepspeed_config, stage

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "recipes").glob("*.yaml"))
MINIMAL = "model: m\ndata: pairs.jsonl\nloss: dpo\noutput_dir: runs/x\n"
Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def _write(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, "utf-8")
        return path

    return _write


def test_minimal_recipe(write: Write) -> None:
    recipe, notes = load(write(MINIMAL))
    assert (recipe.model, recipe.lora, recipe.output_dir) == (ModelSpec("m"), None, "runs/x")
    assert recipe.data.train == (Source("pairs.jsonl"),)
    assert recipe.loss == (Term(DPO()),)
    assert [recipe.train[k] for k in ("learning_rate", "num_train_epochs", "eval_strategy")] == [1e-6, 1, "no"]
    assert notes == []


def test_types_follow_the_field_not_the_text(write: Write) -> None:
    recipe, _ = load(
        write(
            MINIMAL.replace("loss: dpo", "loss: {head: dpo, beta: 1e-1}")
            + "train: {learning_rate: 1e-5, eval_strategy: no, per_device_train_batch_size: '2', bf16: yes}\n"
            + "lora: {r: 8, alpha: 1}\n"
        )
    )
    assert recipe.loss[0].head == DPO(beta=0.1)
    assert recipe.train["learning_rate"] == 1e-5
    assert recipe.train["eval_strategy"] == "no"
    assert recipe.train["per_device_train_batch_size"] == 2
    assert recipe.train["bf16"] is True
    assert recipe.lora == LoraSpec(r=8, alpha=1.0)


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ("data: a.jsonl", "data: {train: [{path: a.jsonl}]}"),
        ("data: [a.jsonl, b.jsonl]", "data: {train: [{path: a.jsonl}, {path: b.jsonl}]}"),
        ("data: {train: {path: a.jsonl, limit: 3}}", "data: {train: [{path: a.jsonl, limit: 3}]}"),
        ("data: {train: a, eval: [b, {path: c}]}", "data: {train: [{path: a}], eval: [{path: b}, {path: c}]}"),
        ("reference: base", "reference: {from: base}"),
        ("loss: {head: dpo, beta: 0.2}", "loss: [{head: dpo, beta: 0.2}]"),
        ("loss: [dpo, {head: sft, weight: 0.1}]", "loss: [{head: dpo}, {head: sft, weight: 0.1}]"),
        ("lora: {modules_to_save: lm_head}", "lora: {modules_to_save: [lm_head]}"),
        ("lora: null", "lora: false"),
        ("model: other", "model: {name_or_path: other}"),
        ("train:", "train: {}"),
    ],
)
def test_shorthands(write: Write, short: str, long: str) -> None:
    key = short.split(":")[0]
    rest = "".join(line for line in MINIMAL.splitlines(keepends=True) if not line.startswith(key))
    assert load(write(rest + short + "\n"))[0] == load(write(rest + long + "\n"))[0]


@pytest.mark.parametrize("path", FILES, ids=[p.stem for p in FILES])
def test_every_recipe_file_parses_and_survives_the_round_trip(path: Path, write: Write) -> None:
    recipe, notes = load(path)
    assert not [n for n in notes if "translated" in n], "our own recipes use our own names"
    assert load(write(resolved_text(recipe))) == (recipe, notes)
    head = path.read_text("utf-8").split("\nmodel")[0]
    assert "arXiv:" in head or path.stem == "quickstart"
    assert "launch/train.py" in head or "po train" in head


def test_every_head_has_a_recipe() -> None:
    used = {name_of(t.head) for path in FILES for t in load(path)[0].loss}
    assert used == set(HEADS)


def test_round_trip_of_everything(write: Write) -> None:
    recipe, _ = load(
        write(
            """
model: {name_or_path: a/b, revision: "0123", dtype: bfloat16, adapter: "1e5", share_prefix: false}
lora: {r: 4, alpha: 8, dropout: 0.1, target_modules: [q_proj, v_proj], use_rslora: true}
reference: {from: "no", kind: frozen, cache_dir: /tmp/x}
data:
  train: [{path: "2024-01-01", columns: {prompt: question}, rank_order: lower_is_better, separator: "\\n\\nAssistant:"}]
  eval: e.jsonl
  pairing: margin
  pairing_margin: 0.5
loss: [{head: ipo, tau: 0.3}, {head: mpo_multi, power: 2, weight: 0.25}]
train: {lr_scheduler_kwargs: {num_cycles: 0.5}, save_total_limit: 3, logging_steps: 0.1}
deepspeed: {zero_optimization: {stage: 2}, train_micro_batch_size_per_gpu: auto}
output_dir: "null"
resume: true
seed: 7
"""
        )
    )
    again, notes = load(write(resolved_text(recipe)))
    assert again == recipe
    assert notes == []
    assert yaml.safe_load(resolved_text(recipe)) == resolved(recipe), "other YAML readers see the same values"
    assert (recipe.model.revision, recipe.model.adapter, recipe.output_dir) == ("0123", "1e5", "null")
    assert recipe.data.train[0].separator == "\n\nAssistant:"


def test_resolved_holds_every_value_but_no_secret(write: Write) -> None:
    recipe, _ = load(write(MINIMAL + "deepspeed: {monitor: {api_key: abc123, wandb_token: t, tokenizer: x}}\n"))
    text = resolved_text(recipe)
    assert "abc123" not in text
    assert resolved(recipe)["deepspeed"] == {
        "monitor": {"api_key": "<redacted>", "wandb_token": "<redacted>", "tokenizer": "x"}
    }
    assert {"learning_rate", "weight_decay", "adam_beta2", "optim", "bf16"} <= resolved(recipe)["train"].keys()
    assert resolved(recipe)["loss"] == [{"head": "dpo", "weight": 1.0, "beta": 0.1, "label_smoothing": 0.0}]
    with pytest.raises(UserError, match=r"deepspeed\.monitor\.api_key: was taken out when the recipe was saved"):
        load(write(text))


# Overrides


@pytest.mark.parametrize(
    ("words", "get", "value"),
    [
        (["loss.0.beta=0.2"], lambda r: r.loss[0].head, DPO(beta=0.2)),
        (["loss[0].beta=0.2"], lambda r: r.loss[0].head, DPO(beta=0.2)),
        (["loss.beta=0.2"], lambda r: r.loss[0].head, DPO(beta=0.2)),
        (["--beta=0.2"], lambda r: r.loss[0].head, DPO(beta=0.2)),
        (["loss.0.head=ipo", "loss.0.beta=0.2"], lambda r: r.loss[0].head, IPO(tau=0.2)),
        (["loss=infonca"], lambda r: r.loss[0].head, InfoNCA()),
        (["loss=[{head: infonca, alpha: 2}]"], lambda r: r.loss[0].head, InfoNCA(alpha=2.0)),
        (["train.learning_rate=1e-5"], lambda r: r.train["learning_rate"], 1e-5),
        (["learning_rate=1e-5"], lambda r: r.train["learning_rate"], 1e-5),
        (["train.learning_rate=1e-5", "train.learning_rate=2e-5"], lambda r: r.train["learning_rate"], 2e-5),
        (["train.warmup_ratio=0.1"], lambda r: r.train["warmup_steps"], 0.1),
        (["lora.r=4"], lambda r: r.lora, LoraSpec(r=4)),
        (["--lora_r=4"], lambda r: r.lora, LoraSpec(r=4)),
        (["data.train=*.jsonl"], lambda r: r.data.train, (Source("*.jsonl"),)),
        (["data.train.limit=5"], lambda r: r.data.train, (Source("pairs.jsonl", limit=5),)),
        (["data.train.0.separator=\n\nAssistant:"], lambda r: r.data.train[0].separator, "\n\nAssistant:"),
        (["model.dtype=float32"], lambda r: r.model, ModelSpec("m", dtype="float32")),
        (["model=other", "model.revision='12'"], lambda r: r.model, ModelSpec("other", revision="12")),
        (["reference=base"], lambda r: r.reference.source, "base"),
        (["deepspeed=zero2"], lambda r: r.deepspeed, "zero2"),
        (["resume=true", "seed=3"], lambda r: (r.resume, r.seed), (True, 3)),
        (["train.report_to=none"], lambda r: r.train["report_to"], "none"),
    ],
)
def test_overrides(write: Write, words: list[str], get: Callable[[Recipe], Any], value: Any) -> None:
    assert get(load(write(MINIMAL), words)[0]) == value


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["loss.3.beta=1"], "command line: loss[3].beta: loss has 1 entries, counted from 0; there is no [3]."),
        (["modle.dtype=auto"], "command line: modle.dtype: unknown key. Did you mean 'model'?"),
        (["output_dir.x=1"], "command line: output_dir.x: output_dir is 'runs/x', which has no 'x'."),
        (
            ["loss.0.bta=1"],
            "loss[0].bta (given on the command line): head 'dpo' has no such hyperparameter. Did you mean 'beta'?",
        ),
        (
            ["train.lerning_rate=1"],
            "train.lerning_rate (given on the command line): transformers.TrainingArguments has no ",
        ),
        (["lerning_rate=1"], "command line: lerning_rate: unknown key. Did you mean 'learning_rate'?"),
        (["beta"], "command line: 'beta': expected key=value, e.g. train.learning_rate=1e-5 or loss.0.beta=0.2"),
        (["seed=x"], "seed (given on the command line): expected a whole number >= 0 and < 4294967296, got 'x'."),
    ],
)
def test_wrong_overrides(write: Write, words: list[str], message: str) -> None:
    with pytest.raises(UserError) as e:
        load(write(MINIMAL), words)
    assert message in str(e.value)


def test_override_of_one_among_several_terms_needs_an_index(write: Write) -> None:
    with pytest.raises(UserError, match=r"loss has 2 entries; say which, e\.g\. loss\[0\]\.beta\."):
        load(write(MINIMAL.replace("loss: dpo", "loss: [dpo, ipo]")), ["loss.beta=1"])


# What the rest of po reads


def test_training_arguments(write: Write) -> None:
    words = ["model.dtype=float32", "train.save_total_limit=2", "train.per_device_train_batch_size=3", "seed=5"]
    recipe, _ = load(write(MINIMAL), words)
    args = training_arguments(recipe)
    assert (args.per_device_train_batch_size, args.seed, args.output_dir) == (3, 5, "runs/x")
    assert (args.learning_rate, args.num_train_epochs, args.logging_steps) == (1e-6, 1.0, 10)
    assert (args.report_to, args.remove_unused_columns, args.logging_nan_inf_filter) == ([], False, False)
    assert (args.bf16, args.fp16, args.disable_tqdm) == (False, False, False)
    assert (args.save_total_limit, keep_checkpoints(recipe)) == (None, 2), "po rotates sealed checkpoints itself"


def test_autocast_follows_the_weights_unless_the_recipe_says(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    args = training_arguments(load(write(MINIMAL), ["model.dtype=bfloat16"])[0])
    assert (args.bf16, args.fp16, args.use_cpu) == (True, False, True)
    assert training_arguments(load(write(MINIMAL), ["model.dtype=bfloat16", "train.bf16=false"])[0]).bf16 is False
    with pytest.raises(UserError, match=r"model\.name_or_path: there is no folder '\./nowhere'"):
        training_arguments(load(write(MINIMAL), ["model=./nowhere"])[0])


def test_lora_and_evaluation_change_the_defaults(write: Write) -> None:
    recipe, _ = load(write(MINIMAL + "lora: {}\n"), ["data.eval=e.jsonl"])
    assert (recipe.train["learning_rate"], recipe.train["eval_strategy"]) == (1e-5, "epoch")


def test_reference_is_none_where_no_head_reads_it(write: Write) -> None:
    recipe, notes = load(write(MINIMAL.replace("dpo", "sft")))
    assert recipe.reference.source == "none"
    assert notes == []
    recipe, notes = load(write(MINIMAL.replace("dpo", "sft") + "reference: init\n"))
    assert recipe.reference.source == "none"
    assert notes == ["reference: 'init' is not computed, because no head of the recipe needs a reference"]


# DeepSpeed


@pytest.mark.parametrize("name", PRESETS)
def test_presets_leave_the_optimizer_to_the_trainer(name: str) -> None:
    config = deepspeed_config(name)
    assert config is not None
    assert not {"optimizer", "scheduler"} & config.keys()
    assert stage(name) == int(name[4])
    zero = config["zero_optimization"]
    assert ("offload_optimizer" in zero, "offload_param" in zero) == ("offload" in name, name == "zero3_offload")
    assert zero.get("stage3_gather_16bit_weights_on_model_save", False) == name.startswith("zero3")
    config["zero_optimization"]["stage"] = 9
    assert stage(name) == int(name[4]), "a caller's changes do not reach the preset"


def test_deepspeed_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    assert stage(str(path)) == 2
    assert deepspeed_config(None) is None
    path.write_text("{")
    with pytest.raises(UserError, match=r"deepspeed: .*ds\.json: expected DeepSpeed's JSON: Expecting property name"):
        deepspeed_config(str(path))


# The schema and the YAML


def test_schema_knows_every_key() -> None:
    tree = schema()
    assert set(tree["properties"]) == {f.name for f in fields(Recipe)}
    terms = tree["properties"]["loss"]["anyOf"][0]["anyOf"][1:]
    assert [t["properties"]["head"]["const"] for t in terms] == list(HEADS)
    beta = next(t for t in terms if t["properties"]["head"]["const"] == "dpo")["properties"]["beta"]
    assert beta == {"type": "number", "exclusiveMinimum": 0, "default": 0.1}
    assert "learning_rate" in tree["properties"]["train"]["properties"]
    assert "output_dir" not in tree["properties"]["train"]["properties"]
    max_length = tree["properties"]["data"]["anyOf"][1]["properties"]["max_length"]
    says = "prompt + response, tokens"
    assert max_length == {"minimum": 2, "type": "integer", "description": says, "default": 2048}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("5E3", 5000.0),
        ("010", 10),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("null", None),
        ("", None),
        ("2024-01-01", "2024-01-01"),
        ("1:30", "1:30"),
        ("[1, 2e-1]", [1, 0.2]),
        ("'1'", "1"),
        ("a: b", "a: b"),
        ("*.jsonl", "*.jsonl"),
        ("path#1", "path#1"),
    ],
)
def test_scalars(text: str, value: Any) -> None:
    assert recipe_text.scalar(text) == value
    assert type(recipe_text.scalar(text)) is type(value)


TEXTS = ["no", "1e5", "010", "null", "", "2024-01-01", "true", " x", "a: b", "\n\nAssistant:", "~", "-", "\u00e9"]


@pytest.mark.parametrize("value", TEXTS)
def test_dumped_text_reads_back(value: str, write: Write) -> None:
    dumped = recipe_text.dump({"k": value})
    assert recipe_text.read(write(dumped)) == {"k": value}
    assert yaml.safe_load(dumped) == {"k": value}
