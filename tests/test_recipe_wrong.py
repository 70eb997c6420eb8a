"""Wrong recipes by exact text: unknown keys, types, ranges, contradictions, YAML."""

from __future__ import annotations

from pathlib import Path

import pytest

from po.errors import UserError
from po.recipe import load, resolved_text

GOOD = {"model": "m", "data": "pairs.jsonl", "loss": "dpo", "output_dir": "runs/x"}


def recipe(tmp_path: Path, **lines: str | None) -> Path:
    path = tmp_path / "recipe.yaml"
    text = {**GOOD, **lines}
    path.write_text("".join(f"{k}: {v}\n" for k, v in text.items() if v is not None), "utf-8")
    return path


WRONG = [
    # keys
    (
        {"outputdir": "x"},
        "outputdir: unknown key. Did you mean 'output_dir'? A recipe has: model, data, loss, output_dir,",
    ),
    (
        {"model": "{name_or_path: m, dtpye: auto}"},
        "model.dtpye: unknown key. Did you mean 'dtype'? It has: name_or_path,",
    ),
    ({"lora": "{dropuot: 0}"}, "lora.dropuot: unknown key. Did you mean 'dropout'?"),
    ({"reference": "{form: base}"}, "reference.form: unknown key. Did you mean 'from'? It has: from, kind, cache_dir."),
    ({"data": "{trian: x, train: y}"}, "data.trian: unknown key. Did you mean 'train'?"),
    ({"data": "{train: {pth: x}}"}, "data.train[0].pth: unknown key. Did you mean 'path'? It has: path, name, split,"),
    (
        {"loss": "{head: dpo, bta: 0.2}"},
        "recipe.yaml: loss[0].bta: head 'dpo' has no such hyperparameter. Did you mean 'beta'? It has: beta, label_"
        "smoothing, weight.",
    ),
    ({"loss": "[dpo, {head: dpoo}]"}, "loss[1].head: no head is called 'dpoo'. Did you mean 'dpo'? Heads: a_lol,"),
    (
        {"train": "{lerning_rate: 1}"},
        "train.lerning_rate: transformers.TrainingArguments has no such field. Did you mean 'learning_rate'?",
    ),
    ({"overlong": "drop"}, "overlong: does not stand at the top level; write it as data.overlong."),
    ({"train": "{max_length: 5}"}, "train.max_length: does not stand here; write it as data.max_length."),
    (
        {"train": "{output_dir: x}"},
        "train.output_dir: is not for the recipe's `train`: belongs at the top level of the recipe.",
    ),
    ({"train": "{deepspeed: zero2}"}, "train.deepspeed: is not for the recipe's `train`: belongs at the top level"),
    (
        {"train": "{resume_from_checkpoint: true}"},
        "train.resume_from_checkpoint: is not for the recipe's `train`: write `resume",
    ),
    ({"train": "{label_smoothing_factor: 0.1}"}, "write it in the loss: `{head: dpo, label_smoothing: 0.1}`."),
    (
        {"train": "{auto_find_batch_size: true}"},
        "it changes the objective in silence; lower per_device_train_batch_size and",
    ),
    ({"train": "{fsdp: full_shard}"}, "po distributes with plain DDP or `deepspeed:` at the top level of the recipe."),
    # what is missing
    ({"model": None}, "model: is missing; expected a folder or a hub name, e.g. `model: Qwen/Qwen2.5-0.5B-Instruct`."),
    ({"output_dir": None}, "output_dir: is missing; expected the run's folder, e.g. `output_dir: runs/first`."),
    ({"loss": None}, "loss: is missing; expected a head, e.g. `loss: {head: dpo, beta: 0.1}`; `po heads` lists them."),
    (
        {"data": "{eval: x}"},
        "data.train: is missing; expected a file, a folder or a hub name, e.g. `train: pairs.jsonl`.",
    ),
    ({"data": "{train: {split: x}}"}, "data.train[0].path: is missing; expected text."),
    ({"model": "{dtype: auto}"}, "model.name_or_path: is missing; expected text."),
    ({"loss": "[]"}, "loss: is empty; expected a head,"),
    ({"reference": ""}, "reference: is empty; expected init, base, none or a path, e.g. `reference: init`."),
    # types and ranges
    ({"lora": "true"}, "lora: expected a mapping, got true; write e.g. `lora: {r: 16, alpha: 32}`, or `lora: {}`."),
    ({"lora": "{r: 0}"}, "lora.r: expected a whole number >= 1, got 0."),
    ({"lora": "{dropout: 1}"}, "lora.dropout: expected a number >= 0 and < 1, got 1."),
    ({"loss": "{head: dpo, beta: -1}"}, "loss[0].beta: expected a number > 0, got -1."),
    ({"loss": "{head: dpo, beta: .inf}"}, "loss[0].beta: expected a number > 0, got .inf."),
    ({"loss": "{head: dpo, beta: .nan}"}, "loss[0].beta: expected a number > 0, got .nan."),
    ({"loss": "{head: dpo, beta: true}"}, "loss[0].beta: expected a number > 0, got true."),
    (
        {"loss": "{head: dpo, label_smoothing: 0.5}"},
        "loss[0].label_smoothing: expected a number >= 0 and < 0.5, got 0.5.",
    ),
    ({"loss": "{head: dpo, weight: 0}"}, "loss[0].weight: expected a number > 0, got 0."),
    ({"loss": "{head: mpo_multi, power: 3}"}, "loss[0].power: expected one of 0, 1, 2, got 3."),
    (
        {"loss": "{dpo: {beta: 1}}"},
        "loss[0]: expected a head and its hyperparameters, e.g. {head: dpo, beta: 0.1}, got {dpo:",
    ),
    (
        {"data": "{train: x, overlong: dorp}"},
        "data.overlong: expected one of 'drop', 'truncate_prompt', 'truncate_response', 'error', got 'dorp'. Did you "
        "mean 'drop'?",
    ),
    ({"data": "{train: x, max_length: 1.5}"}, "data.max_length: expected a whole number >= 2, got 1.5."),
    ({"data": "{train: x, max_dropped: 2}"}, "data.max_dropped: expected a number >= 0 and <= 1, got 2."),
    (
        {"model": "{name_or_path: m, revision: 12}"},
        "model.revision: expected text or null, got 12; write it in quotes.",
    ),
    (
        {"model": "{name_or_path: m, share_prefix: maybe}"},
        "model.share_prefix: expected 'auto' or true or false, got 'maybe'.",
    ),
    ({"train": "{learning_rate: fast}"}, "train.learning_rate: expected a number > 0, got 'fast'."),
    (
        {"train": "{per_device_train_batch_size: 0}"},
        "train.per_device_train_batch_size: expected a whole number >= 1, got 0.",
    ),
    ({"train": "{optim: adamw}"}, "'adamw_torch_8bit' and 33 more, got 'adamw'. Did you mean 'adamw_torch'?"),
    (
        {"train": "{eval_strategy: epochs}"},
        "train.eval_strategy: expected one of 'no', 'steps', 'epoch', got 'epochs'. Did you",
    ),
    ({"train": "{report_to: [wandbb]}"}, "train.report_to: no tracker is called 'wandbb'. Did you mean 'wandb'?"),
    ({"train": "3"}, "train: expected a mapping, e.g. {learning_rate: 1e-6}, got 3"),
    ({"resume": "maybe"}, "resume: expected true or false, got 'maybe'."),
    ({"seed": "-1"}, "seed: expected a whole number >= 0 and < 4294967296, got -1."),
    # combinations
    (
        {"reference": "{kind: adapter_off}"},
        "reference.kind: adapter_off computes the reference by switching the adapter off, and",
    ),
    (
        {"model": "{name_or_path: m, adapter: sft}", "reference": "{from: init, kind: adapter_off}"},
        "reference.kind: adapter_off gives the base model, but this run starts from model.adapter, which is its own "
        "reference (from: init). Write `kind: cached` or `kind: frozen`, or `from: base` if the base is meant.",
    ),
    (
        {"lora": "{}", "reference": "{from: other, kind: adapter_off}"},
        "reference.kind: adapter_off gives the base model, not 'other'; write `kind: cached` or `kind: frozen`.",
    ),
    (
        {"reference": "none"},
        "reference.from: is 'none', but the head 'dpo' needs a reference; write init (the policy at step 0),",
    ),
    (
        {"model": "{name_or_path: m, load_in_4bit: true}"},
        "model.load_in_4bit: 4-bit weights cannot be trained; add `lora: {r: 16}`",
    ),
    (
        {"model": "{name_or_path: m, load_in_4bit: true}", "lora": "{}", "deepspeed": "zero3"},
        "model.load_in_4bit: ZeRO-3 cannot partition 4-bit weights; use `deepspeed: zero2`.",
    ),
    (
        {"model": "{name_or_path: m, dtype: float16}"},
        "model.dtype: all weights cannot be trained in float16; use bfloat16,",
    ),
    (
        {"lora": "{modules_to_save: [lm_head]}", "deepspeed": "zero3_offload"},
        "lora.modules_to_save: does not work under ZeRO-3; leave it out, or use `deepspeed: zero2`.",
    ),
    (
        {"lora": "{target_modules: [lm_head]}", "deepspeed": "zero3"},
        "lora.target_modules: LoRA on lm_head does not work under",
    ),
    (
        {"data": "{train: x, pairing: margin}"},
        "data.pairing_margin: is missing; `pairing: margin` takes the least reward",
    ),
    (
        {"data": "{train: x, pairing_margin: 1}"},
        "data.pairing_margin: has no effect with `pairing: best_vs_worst`; write",
    ),
    (
        {"data": "{train: x, max_length: 10, max_prompt_length: 10}"},
        "data.max_prompt_length: is 10, which leaves no room for a response in max_length 10.",
    ),
    (
        {"train": "{eval_strategy: epoch}"},
        "train.eval_strategy: needs evaluation rows; name them at data.eval, or leave this",
    ),
    ({"train": "{bf16: true, fp16: true}"}, "train.fp16: and bf16 are both true; keep one of them."),
    (
        {"train": "{train_sampling_strategy: group_by_length}"},
        "expected 'random' or 'sequential', got 'group_by_length'; po",
    ),
    (
        {"train": "{save_steps: 2.5}"},
        "train.save_steps: expected a whole number of steps, or a share below 1, got 2.5.",
    ),
    # deepspeed
    (
        {"deepspeed": "zero4"},
        "deepspeed: there is no preset and no file 'zero4'. Did you mean 'zero3'? Presets: zero0, zero1,",
    ),
    ({"deepspeed": "configs/ds_zero2.json"}, "no file 'configs/ds_zero2.json'. Did you mean 'zero2'? Presets:"),
    (
        {"deepspeed": "{optimizer: {type: AdamW}}"},
        "deepspeed: the configuration has its own 'optimizer', which would overrule",
    ),
    (
        {"deepspeed": "{zero_optimization: {stage: 5}}"},
        "deepspeed.zero_optimization.stage: expected 0, 1, 2 or 3, got 5",
    ),
    (
        {"deepspeed": "{gradient_accumulation_steps: 4}"},
        "deepspeed.gradient_accumulation_steps: is 4, but train.gradient_accumulation_steps is 1; write 'auto' here.",
    ),
]


@pytest.mark.parametrize(("lines", "message"), WRONG, ids=[m[:40] for _, m in WRONG])
def test_wrong_recipe(tmp_path: Path, lines: dict[str, str | None], message: str) -> None:
    path = recipe(tmp_path, **lines)
    with pytest.raises(UserError) as e:
        load(path)
    assert message in str(e.value)
    assert str(e.value).startswith(f"{path}: ")
    assert e.value.exit_code == 2


def test_all_problems_in_one_report(tmp_path: Path) -> None:
    path = recipe(
        tmp_path,
        lora="{r: 0}",
        loss="[{head: dpo, bta: 1}, {head: dpoo}]",
        train="{lerning_rate: 1, fsdp: x}",
        data="{train: x, pairing: margin}",
        outputdir="x",
        deepspeed="zero9",
    )
    with pytest.raises(UserError) as e:
        load(path)
    first, *rest = str(e.value).splitlines()
    assert first == f"{path}: 8 problems"
    for place in (
        "outputdir",
        "lora.r",
        "loss[0].bta",
        "loss[1].head",
        "train.lerning_rate",
        "train.fsdp",
        "deepspeed",
    ):
        assert sum(line.startswith(f"  {path}: {place}: ") for line in rest) == 1, place
    assert len(rest) == 8
    assert "lora.r: expected" in str(e.value)


YAML = [
    ("loss: dpo\nloss: ipo\n", ":2:1: 'loss' is here for the second time; keep one of them"),
    (
        "train:\n\tlearning_rate: 1\n",
        ":2:1: found character '\\t' that cannot start any token; YAML indents with spaces,",
    ),
    ("model: {name_or_path: m\nloss: dpo\n", ":2:5: "),
    ("model: m\n  loss: dpo\n", ":2:7: mapping values are not allowed here"),
    ("1: x\n", ":1:1: expected a name, got '1'"),
    ("- a\n", ": expected a mapping (`key: value` lines), got list"),
    ("", ": the recipe is empty; it needs at least model, data, loss and output_dir"),
    ("model: !!python/object:os.system x\n", ":1:8: could not determine a constructor for the tag"),
    ("model: &a [*a]\n", ":1:8: found unconstructable recursive node"),
    ("train: {lr_scheduler_kwargs: {a: 1, a: 2}}\n", ":1:37: 'a' is here for the second time; keep one of them"),
]


@pytest.mark.parametrize(("text", "message"), YAML)
def test_wrong_yaml(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as e:
        load(path)
    assert str(e.value).startswith(f"{path}{message}")


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.yaml: No such file or directory; expected a recipe, a YAML file"):
        load(tmp_path / "nowhere.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"model: \xe9\n")
    with pytest.raises(UserError, match=r"latin\.yaml: not UTF-8 text at byte 7; save the recipe as UTF-8"):
        load(tmp_path / "latin.yaml")


NASTY = ["5", "true", "null", "''", "[]", "[[a]]", "{}", "{a: [1]}", "[{a: 1}]", ".nan", "[{head: [dpo]}]", "[null]"]
PLACES = ["model", "lora", "reference", "data", "loss", "train", "deepspeed", "output_dir", "seed", "loss_type", "beta"]
PLACES += ["datasets", "dataset_mixer", "max_samples", "truncation_mode", "lora_target", "loss_weights", "use_peft"]


@pytest.mark.parametrize("place", PLACES)
def test_anything_anywhere_is_right_or_explained(tmp_path: Path, place: str) -> None:
    """No value of any shape ends in a traceback, and what is accepted survives the round trip."""
    for value in NASTY:
        try:
            found, _ = load(recipe(tmp_path, **{place: value}))
        except UserError:
            continue
        (tmp_path / "again.yaml").write_text(resolved_text(found))
        assert load(tmp_path / "again.yaml")[0] == found, value
