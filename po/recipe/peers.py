"""Peers' flat names that need more than a line in a table: adapters by a word, datasets in parts, stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from po.recipe.fields import shown
from po.recipe.report import Report
from po.spec import LoraSpec

Tree = dict[str, Any]
Handler = Callable[[Tree, str, Any, Mapping[str, Any], Report], None]

_OFF: tuple[Any, ...] = (None, False, 0, "", [], {})
_FILES = (".json", ".jsonl", ".parquet", ".gz", ".arrow")


def _section(tree: Tree, name: str) -> Tree:
    if not isinstance(tree.get(name), dict):
        tree[name] = {}
    section: Tree = tree[name]
    return section


def _lora_on(tree: Tree, key: str, value: Any, report: Report) -> None:
    given = _section(tree, "lora")
    left = {k: v for k, v in vars(LoraSpec()).items() if k not in given and v not in (None, False)}
    values = ", ".join(f"{k} {v}" for k, v in left.items())
    report.note(
        f"{key}: {shown(value)} is po's section `lora`; what it leaves out has po's defaults ({values}), not the peer's"
    )


def _lora_off(tree: Tree, key: str, value: Any, report: Report) -> None:
    if tree.get("lora"):
        report.note(f"{key}: {shown(value)}, so the recipe's LoRA settings are left out and all weights are trained")
    tree["lora"] = None


def _adapter(tree: Tree, key: str, value: Any, said: Mapping[str, Any], report: Report) -> None:
    """use_peft (TRL), finetuning_type (LLaMA-Factory), train_type (ms-swift), adapter (axolotl)."""
    if value in (True, "lora", "qlora"):
        _lora_on(tree, key, value, report)
        if value == "qlora":
            _section(tree, "model")["load_in_4bit"] = True
            report.note(f"{key}: qlora is translated to model.load_in_4bit: true")
    elif value in (None, False, "", "full"):
        _lora_off(tree, key, value, report)
    else:
        report.wrong((key,), f"cannot be translated: po trains with `lora` or in full, not with {shown(value)}.")


def _quantization_bit(tree: Tree, key: str, value: Any, said: Mapping[str, Any], report: Report) -> None:
    if value in (4, "4"):
        _section(tree, "model")["load_in_4bit"] = True
        report.note(f"{key}: 4 is translated to model.load_in_4bit: true")
    elif value not in _OFF:
        report.wrong((key,), f"cannot be translated: po quantises to 4 bits only, got {shown(value)}.")


def _lora_target_linear(tree: Tree, key: str, value: Any, said: Mapping[str, Any], report: Report) -> None:
    if value is True:
        _section(tree, "lora")["target_modules"] = "all-linear"
        report.note(f"{key}: translated to lora.target_modules: all-linear")


def _bnb_quant_type(tree: Tree, key: str, value: Any, said: Mapping[str, Any], report: Report) -> None:
    if value not in ("nf4", None):
        report.wrong((key,), f"cannot be translated: po's 4-bit weights are nf4, got {shown(value)}.")


def _precompute(tree: Tree, key: str, value: Any, said: Mapping[str, Any], report: Report) -> None:
    if value is True:
        _section(tree, "reference").setdefault("kind", "cached")
        report.note(f"{key}: translated to reference.kind: cached")
    else:
        report.note(
            f"{key}: {shown(value)} is left out; reference.kind says how the reference is computed (default: cached)"
        )


def _disable_dropout(tree: Tree, key: str, value: Any, said: Mapping[str, Any], report: Report) -> None:
    if value is False:
        report.wrong(
            (key,), "cannot be translated: po trains without the base model's dropout; LoRA's is lora.dropout."
        )
    else:
        report.note(f"{key}: has no effect; po trains without the base model's dropout always")


def _stage(tree: Tree, key: str, value: Any, said: Mapping[str, Any], report: Report) -> None:
    if value in ("dpo", "sft", "grpo"):
        if value == "sft" and tree.get("loss") is None:
            tree["loss"] = [{"head": "sft"}]
        report.note(f"{key}: {value} is said by `loss` in po")
    else:
        report.wrong((key,), f"cannot be translated: po has no stage {shown(value)}; it trains the heads of `loss`.")


def _chat_template(tree: Tree, key: str, value: Any, said: Mapping[str, Any], report: Report) -> None:
    if value in (None, "", "tokenizer_default"):
        report.note(f"{key}: has no effect; po uses the tokenizer's own template")
    elif isinstance(value, str) and (value.endswith(".jinja") or Path(value).is_file()):
        _section(tree, "model")["chat_template"] = value
        report.note(f"{key}: translated to model.chat_template: {shown(value)}")
    else:
        report.wrong(
            (key,), "cannot be translated: po uses the tokenizer's own; another is a Jinja file, model.chat_template."
        )


def _resume(tree: Tree, key: str, value: Any, said: Mapping[str, Any], report: Report) -> None:
    if isinstance(value, str):
        report.wrong(
            (key,), "cannot be translated: po finds the newest sound checkpoint of output_dir; write `resume: true`."
        )
        return
    tree["resume"] = bool(value)
    report.note(f"{key}: translated to resume: {shown(bool(value))}")


def _wandb(tree: Tree, key: str, value: Any, said: Mapping[str, Any], report: Report) -> None:
    if value not in _OFF:
        _section(tree, "train").setdefault("report_to", ["wandb"])
        report.note(f"{key}: translated to train.report_to: [wandb]; set the project with WANDB_PROJECT={value}")


# Data


def _dataset_name(tree: Tree, key: str, value: Any, said: Mapping[str, Any], report: Report) -> None:
    """TRL: dataset_name, dataset_config, dataset_train_split, dataset_test_split (only where the run evaluates)."""
    if "dataset_name" not in said:
        report.wrong((key,), "says a part of a dataset that is not named: dataset_name is missing.")
        return
    if key != "dataset_name":
        return
    source = {"path": value, "name": said.get("dataset_config")}
    local = Path(str(value)).exists() or str(value).endswith(_FILES)
    split = said.get("dataset_train_split", None if local else "train")
    _give(tree, "train", [source | {"split": split}], key, report)
    evaluates = _section(tree, "train").get("eval_strategy", "no") != "no"
    if evaluates:
        test = said.get("dataset_test_split", None if local else "test")
        _give(tree, "eval", [source | {"split": test}], "dataset_test_split", report)
    elif "dataset_test_split" in said:
        report.note("dataset_test_split: left out, as in TRL, because eval_strategy is 'no'")


def _give(tree: Tree, split: str, sources: list[Tree], key: str, report: Report) -> None:
    data = _section(tree, "data")
    if data.get(split):
        report.wrong((key,), f"is another name of data.{split}, which the recipe gives as well; keep one of them.")
        return
    data[split] = [{k: v for k, v in s.items() if v is not None} for s in sources]
    report.origin["data", split] = f"given as {key}"
    report.note(f"{key}: translated to data.{split}: {shown(data[split])}")


def _dataset(tree: Tree, key: str, value: Any, said: Mapping[str, Any], report: Report) -> None:
    """LLaMA-Factory: names of dataset_info.json, comma-separated; a path or a hub name is one of ours."""
    names = (
        [n.strip() for n in value.split(",")]
        if isinstance(value, str)
        else value
        if isinstance(value, list)
        else [value]
    )
    registered = [n for n in names if not (isinstance(n, str) and ("/" in n or Path(n).suffix or Path(n).exists()))]
    if registered:
        report.wrong(
            (key,),
            f"cannot be translated: {shown(registered[0])} is no path and no hub name (po reads no dataset_info.json). "
            "Give the file: data: {train: rows.jsonl}.",
        )
        return
    _give(tree, "eval" if key == "eval_dataset" else "train", [{"path": n} for n in names], key, report)


def _datasets(tree: Tree, key: str, value: Any, said: Mapping[str, Any], report: Report) -> None:
    """axolotl: a list of {path, name, split, data_files, type}; po detects the rows' format itself."""
    sources = []
    for i, entry in enumerate(value if isinstance(value, list) else [value]):
        if not isinstance(entry, dict) or "path" not in entry:
            report.wrong((key, i), f"expected a mapping with `path`, got {shown(entry)}.")
            return
        files = entry.get("data_files")
        path = (files[0] if isinstance(files, list) and len(files) == 1 else files) or entry["path"]
        sources.append({"path": path, "name": entry.get("name"), "split": entry.get("split")})
        if "type" in entry:
            report.note(f"{key}[{i}].type: has no effect; po detects the rows' format and says which it found")
        for extra in sorted(entry.keys() - {"path", "name", "split", "data_files", "type", "ds_type"}):
            report.wrong(
                (key, i, extra), "cannot be translated; po's sources have path, name, split, columns, separator."
            )
    _give(tree, "eval" if key == "test_datasets" else "train", sources, key, report)


def _mixer(tree: Tree, key: str, value: Any, said: Mapping[str, Any], report: Report) -> None:
    """The alignment-handbook: dataset_mixer {name: share} and dataset_splits [train_prefs, test_prefs]."""
    if key == "dataset_splits":
        return
    if not isinstance(value, dict) or any(share != 1 for share in value.values()):
        report.wrong(
            (key,), f"cannot be translated: po takes whole datasets (or the first `limit` rows), got {shown(value)}."
        )
        return
    for split, word in (("train", "train"), ("eval", "test")):
        splits = [s for s in said.get("dataset_splits", ["train", "test"]) if word in str(s)]
        if splits:
            _give(tree, split, [{"path": name, "split": s} for name in value for s in splits], key, report)


def _max_samples(tree: Tree, key: str, value: Any, said: Mapping[str, Any], report: Report) -> None:
    if value in _OFF:
        return
    for source in _section(tree, "data").get("train") or []:
        source["limit"] = value
    report.note(f"{key}: translated to data.train[...].limit: {shown(value)}")


HANDLERS: dict[str, Handler] = {  # in the order in which they must run
    "use_peft": _adapter,
    "finetuning_type": _adapter,
    "train_type": _adapter,
    "adapter": _adapter,
    "lora_target_linear": _lora_target_linear,
    "quantization_bit": _quantization_bit,
    "bnb_4bit_quant_type": _bnb_quant_type,
    "precompute_ref_log_probs": _precompute,
    "disable_dropout": _disable_dropout,
    "stage": _stage,
    "rlhf_type": _stage,
    "chat_template": _chat_template,
    "resume_from_checkpoint": _resume,
    "wandb_project": _wandb,
    "dataset_name": _dataset_name,
    "dataset_config": _dataset_name,
    "dataset_train_split": _dataset_name,
    "dataset_test_split": _dataset_name,
    "dataset": _dataset,
    "eval_dataset": _dataset,
    "datasets": _datasets,
    "test_datasets": _datasets,
    "dataset_mixer": _mixer,
    "dataset_splits": _mixer,
    "max_samples": _max_samples,
}
