"""Exports: what others load gives the trained model's log-probs, and what is broken is refused by name."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from test_policy import FOUR_BIT_SIZE, STORIES, needs_bitsandbytes
from test_reference import disturb
from transformers import AutoModelForCausalLM, AutoTokenizer

from po.errors import NumericsError, UserError
from po.export import export_run, vllm_warnings
from po.policy import load_policy, load_tokenizer
from po.recipe import load, resolved_text

IDS = torch.arange(3, 13)[None]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PO_CACHE", str(tmp_path / "po-cache"))


def logps(net: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return net.eval()(input_ids=IDS).logits.float().log_softmax(-1)


def make_run(
    tmp_path: Path,
    config: dict | None = None,
    base: Path | None = None,
    overrides: tuple[str, ...] = (),
    **changes: object,
) -> tuple[Path, torch.Tensor]:
    """A finished run folder, as the trainer leaves it, and the trained model's log-probs of a text."""
    model = base or tiny.make_model(tmp_path / "base", **(config or {}))
    data = tiny.write_pairs(tmp_path / "pairs.jsonl", 6)
    run = tmp_path / "run"
    run.mkdir()
    recipe, _ = load(tiny.write_recipe(tmp_path / "recipe.yaml", model, data, run, **changes), overrides)
    (run / "recipe.resolved.yaml").write_text(resolved_text(recipe))
    net = load_policy(recipe.model, recipe.lora)
    disturb(net)
    truth = logps(net)
    net.save_pretrained(run)
    load_tokenizer(recipe.model).save_pretrained(run)
    return run, truth


LORAS = {
    "lora": {"r": 4},
    "rslora": {"r": 4, "use_rslora": True},
    "dora": {"r": 4, "use_dora": True},
    "saved head": {"r": 4, "modules_to_save": ["lm_head", "norm"]},
    "saved embedding": {"r": 4, "modules_to_save": ["embed_tokens"]},
    "head": {"r": 4, "target_modules": ["q_proj", "lm_head"]},
    "embedding": {"r": 4, "target_modules": ["q_proj", "embed_tokens"]},
    "both": {"r": 4, "target_modules": ["q_proj", "embed_tokens", "lm_head"]},
}


@pytest.mark.parametrize(
    ("lora", "tied"),
    [(name, False) for name in ("lora", "rslora", "dora", "saved head")]
    + [(name, True) for name in ("saved head", "saved embedding", "head", "embedding", "both")],
)
def test_both_exports_give_the_trained_log_probs(tmp_path: Path, lora: str, tied: bool) -> None:
    run, truth = make_run(tmp_path, {"tie_word_embeddings": tied}, lora=LORAS[lora])
    report = export_run(run, tmp_path / "adapter", merged=False)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    torch.testing.assert_close(logps(plain), truth, rtol=0, atol=5e-5)
    assert "max 0, mean 0 nats per token" in report
    report = export_run(run, tmp_path / "merged", merged=True)
    merged, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(logps(merged), truth, rtol=0, atol=5e-5)
    assert report.startswith(f"merged model in float32: {tmp_path / 'merged'}\nlog-prob drift over ")


def test_the_folder_has_what_others_need(tmp_path: Path) -> None:
    run, truth = make_run(tmp_path)
    template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    tokenizer = AutoTokenizer.from_pretrained(run)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(run)
    for merged, weights in ((False, "adapter_model.safetensors"), (True, "model.safetensors")):
        out = tmp_path / f"out-{merged}"
        export_run(run, out, merged)
        assert AutoTokenizer.from_pretrained(out).chat_template == template
        manifest = json.loads((out / "export.json").read_text())
        assert manifest["complete"]
        assert {weights, "README.md", "tokenizer.json", "chat_template.jinja"} < set(manifest["files"])
        assert set(manifest["files"]) | {"export.json"} == {p.name for p in out.iterdir()}
        for name, said in manifest["files"].items():
            data = (out / name).read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (said["bytes"], said["sha256"])
        card = (out / "README.md").read_text()
        assert card.startswith("---\nlibrary_name: ")
        assert "- dpo\n" in card
        assert "beta: 0.5" in card
    config = json.loads((tmp_path / "out-False" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    assert config["inference_mode"] is True
    auto = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out-False")  # finds the base by itself
    torch.testing.assert_close(logps(auto), truth, rtol=0, atol=1e-5)


def test_the_adapters_bits_are_the_runs(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path)
    shutil.copytree(run, run / "ref")  # a frozen copy of another adapter, as PEFT writes beside the trained one
    out = tmp_path / "out"
    export_run(run, out, merged=False)
    a, b = (load_file(p / "adapter_model.safetensors") for p in (run, out))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not (out / "ref").exists()


def test_dtypes(tmp_path: Path) -> None:
    run, truth = make_run(tmp_path)
    report = export_run(run, tmp_path / "m", merged=True, dtype="bfloat16")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert merged.dtype == torch.bfloat16
    assert 1e-5 < (logps(merged) - truth).abs().max() < 0.2
    assert "merged model in bfloat16" in report
    export_run(run, tmp_path / "a", merged=False, dtype="bfloat16")
    assert {t.dtype for t in load_file(tmp_path / "a" / "adapter_model.safetensors").values()} == {torch.bfloat16}
    with pytest.raises(UserError, match=r"--dtype: expected one of float32, bfloat16, float16, got 'int8'"):
        export_run(run, tmp_path / "x", merged=True, dtype="int8")


def test_merging_a_16_bit_run_is_done_in_fp32_and_cast_last(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path, overrides=("model.dtype=bfloat16",))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    fp32 = PeftModel.from_pretrained(base, run).merge_and_unload().to(torch.bfloat16)
    export_run(run, tmp_path / "m", merged=True, dtype="bfloat16")
    written = load_file(tmp_path / "m" / "model.safetensors")
    assert all(torch.equal(written[k], v) for k, v in fp32.state_dict().items())


def test_a_continued_adapter_is_exported_whole(tmp_path: Path) -> None:
    first, _ = make_run(tmp_path)
    (tmp_path / "second").mkdir()
    shutil.copytree(tmp_path / "base", tmp_path / "second" / "base")
    run, truth = make_run(tmp_path / "second", overrides=(f"model.adapter={first}",), lora=None)
    export_run(run, tmp_path / "m", merged=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    torch.testing.assert_close(logps(loaded), truth, rtol=0, atol=1e-5)


def test_full_fine_tuning(tmp_path: Path) -> None:
    run, truth = make_run(tmp_path, lora=None)
    with pytest.raises(UserError) as e:
        export_run(run, tmp_path / "a", merged=False)
    assert str(e.value) == f"{run}: this run trained all weights, so it has no adapter. Use --merged"
    export_run(run, tmp_path / "m", merged=True)
    torch.testing.assert_close(logps(AutoModelForCausalLM.from_pretrained(tmp_path / "m")), truth, rtol=0, atol=1e-6)


@needs_bitsandbytes
def test_qlora_is_merged_into_the_unquantized_base(tmp_path: Path) -> None:
    run, quantized = make_run(tmp_path, FOUR_BIT_SIZE, overrides=("model.load_in_4bit=true",))
    report = export_run(run, tmp_path / "m", merged=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert not hasattr(merged.config, "quantization_config")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), run)
    torch.testing.assert_close(logps(merged), logps(plain), rtol=0, atol=1e-5)
    drift = json.loads((tmp_path / "m" / "export.json").read_text())["drift"]
    assert drift["against"] == "the adapter on its 4-bit base"
    assert "against the adapter on its 4-bit base" in report
    assert 1e-4 < drift["largest"] < 1
    assert 1e-4 < (logps(merged) - quantized).abs().max() < 1


@pytest.mark.skipif(not STORIES.is_dir(), reason="the model stories260k is not here")
def test_a_real_model_with_tied_embeddings(tmp_path: Path) -> None:
    run, truth = make_run(tmp_path, base=STORIES, lora={"r": 8, "modules_to_save": ["lm_head"]})
    for merged in (False, True):
        export_run(run, tmp_path / f"out-{merged}", merged)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(STORIES), tmp_path / "out-False")
    torch.testing.assert_close(logps(plain), truth, rtol=0, atol=1e-4)
    torch.testing.assert_close(
        logps(AutoModelForCausalLM.from_pretrained(tmp_path / "out-True")), truth, rtol=0, atol=1e-4
    )


# What is refused


@pytest.mark.parametrize(
    ("break_it", "error", "text"),
    [
        (lambda t: {k: v[:0] for k, v in t.items()}, UserError, r"is empty \(shape \[0, .*\): ZeRO-3 shards"),
        (lambda t: {}, UserError, r"holds no tensors; the run saved an empty file"),
        (
            lambda t: t | {min(t): t[min(t)] * torch.nan},
            NumericsError,
            r"lora_A.weight' has 256 NaN or Inf among its 256",
        ),
        (lambda t: {k: v for k, v in t.items() if k != min(t)}, UserError, r"1 tensors are only in one of them"),
        (lambda t: t | {min(t): t[min(t)][:, :5]}, UserError, r"does not fit the model .*size mismatch"),
    ],
    ids=["empty tensors", "no tensors", "nan", "a tensor missing", "a wrong shape"],
)
def test_broken_adapters(tmp_path: Path, break_it: object, error: type, text: str) -> None:
    run, _ = make_run(tmp_path)
    file = run / "adapter_model.safetensors"
    save_file({k: v.contiguous() for k, v in break_it(load_file(file)).items()}, file, metadata={"format": "pt"})
    with pytest.raises(error, match=text):
        export_run(run, tmp_path / "out", merged=False)
    manifest = tmp_path / "out" / "export.json"
    assert not manifest.exists() or not json.loads(manifest.read_text())["complete"]


def test_a_cast_that_overflows(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path, lora=None)
    weights = load_file(run / "model.safetensors")
    weights["model.norm.weight"][3] = 1e5
    save_file(weights, run / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        NumericsError, match=r"in float16: the tensor 'model.norm.weight' has 1 NaN or Inf among its 32"
    ):
        export_run(run, tmp_path / "out", merged=True, dtype="float16")


def test_an_export_that_is_another_model_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A merge that loses the adapter: every tensor is written as it is, and they are the wrong ones."""
    run, _ = make_run(tmp_path)
    monkeypatch.setattr("po.export.merge", lambda net: net.unload())
    with pytest.raises(NumericsError, match=r"the export is not the model that was trained. log-prob drift over \d+"):
        export_run(run, tmp_path / "out", merged=True)


def test_a_disk_that_lies_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = make_run(tmp_path)

    def lossy(tensors: dict, path: Path, metadata: dict) -> None:
        save_file({k: v + (k == max(tensors)) for k, v in tensors.items()}, path, metadata=metadata)

    monkeypatch.setattr("safetensors.torch.save_file", lossy)
    with pytest.raises(NumericsError, match=r"read back, the tensor 'base_model.*' is not what was written"):
        export_run(run, tmp_path / "out", merged=False)


def test_folders_that_are_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a run folder \(no recipe.resolved.yaml in it\)"):
        export_run(tmp_path, tmp_path / "out", merged=True)
    run, _ = make_run(tmp_path)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (run / name).unlink()
    with pytest.raises(UserError, match=r"the run has not finished: there are no weights in it. Train it first"):
        export_run(run, tmp_path / "out", merged=True)
    (run / "checkpoint-5").mkdir()
    with pytest.raises(UserError, match=r"It has checkpoint-5: export one of these, or finish it with resume=true"):
        export_run(run, tmp_path / "out", merged=True)


def test_a_checkpoint_is_exported_if_it_is_whole(tmp_path: Path) -> None:
    from po.checkpoint import seal

    run, truth = make_run(tmp_path)
    checkpoint = run / "checkpoint-3"
    checkpoint.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (run / name).rename(checkpoint / name)
    with pytest.raises(UserError, match=r"checkpoint-3: the checkpoint is broken: it has no manifest.json"):
        export_run(checkpoint, tmp_path / "m", merged=True)
    seal(checkpoint, {})
    export_run(checkpoint, tmp_path / "m", merged=True)
    torch.testing.assert_close(logps(AutoModelForCausalLM.from_pretrained(tmp_path / "m")), truth, rtol=0, atol=1e-5)


# Where it writes


def test_only_empty_folders_and_earlier_exports_are_written(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path)
    before = {p: p.read_bytes() for p in run.iterdir()}
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError) as e:
        export_run(run, out, merged=False)
    assert str(e.value) == f"--out: {out} is not empty and not an earlier export; give another folder"
    (out / "thesis.tex").unlink()
    export_run(run, out, merged=True)
    export_run(run, out, merged=False)  # over the earlier one, of which nothing stays
    assert not (out / "model.safetensors").exists()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"holds 'thesis.tex', which no export wrote"):
        export_run(run, out, merged=False)
    for inside in (run, tmp_path):
        with pytest.raises(UserError, match=r"--out: .* is or holds the run itself|is not empty"):
            export_run(run, inside, merged=False)
    assert {p: p.read_bytes() for p in run.iterdir()} == before


def test_planted_links_and_manifests_reach_nothing_outside(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path)
    out, precious = tmp_path / "out", tmp_path / "precious"
    precious.write_text("years of work")
    export_run(run, out, merged=False)
    manifest = json.loads((out / "export.json").read_text())
    manifest["files"] |= {"../precious": {}, str(precious): {}}
    (out / "export.json").write_text(json.dumps(manifest))
    (out / "README.md").unlink()
    (out / "README.md").symlink_to(precious)
    export_run(run, out, merged=False)
    assert precious.read_text() == "years of work"
    assert not (out / "README.md").is_symlink()
    link = tmp_path / "link"
    link.symlink_to(out)
    with pytest.raises(UserError, match=r"is not a folder"):
        export_run(run, link, merged=False)


def test_an_interrupted_export_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = make_run(tmp_path)
    with monkeypatch.context() as m:
        m.setattr("po.export._card", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            export_run(run, tmp_path / "out", merged=True)
    assert not json.loads((tmp_path / "out" / "export.json").read_text())["complete"]
    export_run(run, tmp_path / "out", merged=True)
    assert json.loads((tmp_path / "out" / "export.json").read_text())["complete"]


# The rest


def test_drift_on_given_rows(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path)
    rows = tiny.write_sets(tmp_path / "sets.jsonl", 3)
    export_run(run, tmp_path / "out", merged=True, eval_path=str(rows))
    assert json.loads((tmp_path / "out" / "export.json").read_text())["drift"]["rows"] == 3


def test_vllm_warnings(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path, lora={"r": 24, "use_dora": True, "modules_to_save": ["lm_head"]})
    lines = export_run(run, tmp_path / "out", merged=False).splitlines()[2:]
    assert lines == [
        "warning: vLLM refuses adapters with modules_to_save; serve the merged model (po export --merged)",
        "warning: vLLM refuses DoRA adapters; serve the merged model (po export --merged)",
        "warning: vLLM takes ranks up to 16 by default and this one has 24: start it with --max-lora-rank 24",
    ]
    assert vllm_warnings({"r": 16, "use_rslora": True}) == []


ZERO3 = """
import json, sys, deepspeed, torch
from pathlib import Path
from po.hardening import keep_shm_clean
from po.policy import load_policy
from po.recipe import load
from transformers.integrations import HfDeepSpeedConfig
run = Path(sys.argv[1])
recipe, _ = load(run / "recipe.resolved.yaml", [])
config = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True}
keep_shm_clean()
deepspeed.init_distributed("gloo")
alive = HfDeepSpeedConfig(config)
net = load_policy(recipe.model, recipe.lora)
assert all(p.numel() == 0 for n, p in net.named_parameters() if "q_proj.base_layer" in n)  # partitioned
trained = [p for p in net.parameters() if p.requires_grad]
engine, *_ = deepspeed.initialize(model=net, config=config, optimizer=torch.optim.AdamW(trained, 0.05))
for _ in range(2):
    ids = torch.arange(3, 13)[None]
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()
engine.save_checkpoint(run / "checkpoint-2", tag="global_step2")
with torch.no_grad():
    engine.module.eval()
    torch.save(engine(input_ids=torch.arange(3, 13)[None]).logits.log_softmax(-1), run / "truth.pt")
"""


@pytest.mark.slow
@pytest.mark.parametrize("lora", [{"r": 4, "modules_to_save": ["lm_head"]}, {"r": 4, "use_dora": True}, None])
def test_a_zero3_checkpoint_without_gathered_weights(tmp_path: Path, lora: dict | None) -> None:
    from po.checkpoint import seal

    run, _ = make_run(tmp_path, lora=lora)
    for path in run.glob("*.safetensors"):
        path.unlink()
    (run / "adapter_config.json").unlink(missing_ok=True)
    env = os.environ | {"DS_ACCELERATOR": "cpu", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = subprocess.run([sys.executable, "-c", ZERO3, str(run)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    truth = torch.load(run / "truth.pt")
    checkpoint = run / "checkpoint-2"
    seal(checkpoint, {})
    export_run(checkpoint, tmp_path / "m", merged=True)
    torch.testing.assert_close(logps(AutoModelForCausalLM.from_pretrained(tmp_path / "m")), truth, rtol=0, atol=1e-5)
    if lora:
        export_run(checkpoint, tmp_path / "a", merged=False)
        plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "a")
        torch.testing.assert_close(logps(plain), truth, rtol=0, atol=1e-5)
    shard = next((checkpoint / "global_step2").glob("*optim_states.pt"))
    torch.save({"optimizer_state_dict": os.system}, shard)  # code where tensors belong
    seal(checkpoint, {})
    with pytest.raises(UserError, match=r"holds something other than tensors, which could run code; it is not read"):
        export_run(checkpoint, tmp_path / "x", merged=True)
