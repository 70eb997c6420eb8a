"""Loading: tokenizers, fingerprints, models and adapters; what is refused and how it says so."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import po.weights
from po.errors import UserError
from po.policy import fingerprint, load_frozen, load_policy, load_tokenizer, plainly, tokenizer_key
from po.spec import LoraSpec, ModelSpec

needs_bitsandbytes = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="no bitsandbytes")
FOUR_BIT_SIZE = {"hidden_size": 64, "intermediate_size": 128}  # blocks of 64 values
STORIES = Path(__file__).parents[1].parent / "shared" / "models" / "stories260k"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PO_CACHE", str(tmp_path / "po-cache"))


def logits(net: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return net(input_ids=torch.arange(3, 13)[None]).logits


def trainable(net: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {n: p for n, p in net.named_parameters() if p.requires_grad}


# Folders and the hub


def test_a_missing_folder_names_the_near_one(model_dir: Path) -> None:
    wrong = str(model_dir.parent / "tinny")
    with pytest.raises(UserError) as e:
        fingerprint(wrong)
    assert str(e.value) == (
        f"model.name_or_path: there is no folder {wrong!r}. Did you mean 'tiny'? Expected a model folder or a hub name"
    )


def test_a_file_is_not_a_folder(model_dir: Path) -> None:
    with pytest.raises(UserError, match=r"is a file; expected the folder it lies in"):
        fingerprint(str(model_dir / "config.json"))


def test_an_unreachable_hub_says_what_to_do(tmp_path: Path) -> None:
    code = "from po.weights import fingerprint; fingerprint('some-org/some-model')"
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert (
        "po.errors.UserError: model.name_or_path: there is no folder 'some-org/some-model' here, it is not in the "
        in (done.stderr)
    )
    assert done.stderr.rstrip().endswith("or download it first: hf download some-org/some-model")


def test_a_hub_name_is_its_cached_snapshot(model_dir: Path, tmp_path: Path) -> None:
    """The hub's cache layout, as a download leaves it, read offline by the real client."""
    repo = tmp_path / "hub" / "models--some-org--some-model"
    shutil.copytree(model_dir, repo / "snapshots" / ("a" * 40))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    code = "from po.weights import fingerprint; print(fingerprint('some-org/some-model'))"
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert done.stdout.strip() == fingerprint(str(model_dir))


def test_pickled_weights_are_refused_and_never_opened(model_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model_dir, tmp_path / "pickled")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    for use in (lambda: fingerprint(str(folder)), lambda: load_policy(ModelSpec(str(folder)), None)):
        with pytest.raises(UserError, match=r"has only pickled weights \(pytorch_model.bin\), which can run code"):
            use()


def test_an_index_may_not_point_outside_or_at_nothing(model_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model_dir, tmp_path / "sharded")
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    for name in ("../model.safetensors", "model-00001-of-00001.safetensors"):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
        with pytest.raises(UserError, match=r"lacks the weight file"):
            fingerprint(str(folder))


def test_folders_that_are_no_model(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoint-3").mkdir(parents=True)
    shutil.copy(model_dir / "model.safetensors", tmp_path / "run" / "checkpoint-3")
    with pytest.raises(
        UserError, match=r"it has no model.safetensors. Its subfolder 'checkpoint-3' does: did you mean"
    ):
        fingerprint(str(tmp_path / "run"))
    with pytest.raises(UserError, match=r"checkpoint-3 is not a model folder: it has no config.json"):
        fingerprint(str(tmp_path / "run" / "checkpoint-3"))


# Fingerprints


def test_fingerprint_is_of_content(model_dir: Path, tmp_path: Path) -> None:
    key = fingerprint(str(model_dir))
    copy = shutil.copytree(model_dir, tmp_path / "elsewhere")
    assert fingerprint(str(copy)) == key
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"transformers_version": "9", "_name_or_path": "x"}))
    assert fingerprint(str(copy)) == key
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-4}))
    assert fingerprint(str(copy)) != key
    (copy / "config.json").write_text(json.dumps(config))
    weights = load_file(copy / "model.safetensors")
    renamed = {k.replace("layers.0", "layers.9"): v for k, v in weights.items()}
    save_file(renamed, copy / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(str(copy)) != key
    weights["lm_head.weight"][5, 5] += 1e-6
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(str(copy)) != key


def test_kept_digests_never_outlive_their_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(po.weights, "_BIG", 0)
    monkeypatch.setattr(po.weights, "_SETTLED", -1.0)
    read: list[Path] = []
    real = po.weights._sha256
    monkeypatch.setattr(po.weights, "_sha256", lambda p: read.append(p) or real(p))
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"a" * 100)
    times = os.stat(path)
    first = po.weights._digest(path)
    assert po.weights._digest(path) == first
    assert len(read) == 1  # the second came from the cache
    path.write_bytes(b"b" * 100)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # same path, size, inode and modification time
    assert po.weights._digest(path) == real(path) != first
    (kept,) = [p for p in (tmp_path / "po-cache" / "digests").iterdir() if p.read_text() == real(path)]
    kept.write_text("broken")
    assert po.weights._digest(path) == real(path)


def test_a_digest_of_a_file_just_written_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(po.weights, "_BIG", 0)
    (tmp_path / "x").write_bytes(b"a")
    po.weights._digest(tmp_path / "x")
    assert not (tmp_path / "po-cache").exists()


# Tokenizers


def test_tokenizer_key_is_of_content(model_dir: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(ModelSpec(str(model_dir)))
    key = tokenizer_key(tokenizer)
    moved = load_tokenizer(ModelSpec("x", tokenizer=str(shutil.copytree(model_dir, tmp_path / "elsewhere"))))
    assert tokenizer_key(moved) == key
    moved(["w1 w2", "w1"], padding=True, truncation=True, max_length=2)
    assert tokenizer_key(moved) == key
    moved.chat_template = "{{ messages[0].content }}"
    assert tokenizer_key(moved) != key
    tokenizer.add_tokens(["w999"])
    assert tokenizer_key(tokenizer) != key


def test_pad_token_leaves_eos_alone(model_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model_dir, tmp_path / "no-pad")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for unk, pad in (("<unk>", "<unk>"), (None, "</s>")):
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": None, "unk_token": unk}))
        tokenizer = load_tokenizer(ModelSpec(str(folder)))
        assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.eos_token_id) == (pad, "</s>", 2)


def test_chat_template_file(model_dir: Path, tmp_path: Path) -> None:
    good = tmp_path / "plain.jinja"
    good.write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    tokenizer = load_tokenizer(ModelSpec(str(model_dir), chat_template=str(good)))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "w1"}], tokenize=False) == "w1 "
    with pytest.raises(UserError) as e:
        load_tokenizer(ModelSpec(str(model_dir), chat_template=str(tmp_path / "plane.jinja")))
    assert str(e.value) == (
        f"model.chat_template: there is no file '{tmp_path}/plane.jinja'. Did you mean 'plain.jinja'? "
        "Expected a Jinja template"
    )
    good.write_text("{% for m in messages %}\n{{ m.content }")
    with pytest.raises(UserError, match=r"model.chat_template: .*plain.jinja:2: unexpected '}'"):
        load_tokenizer(ModelSpec(str(model_dir), chat_template=str(good)))
    good.write_text("{{ raise_exception('roles must alternate') }}")  # valid, and it may refuse a conversation
    load_tokenizer(ModelSpec(str(model_dir), chat_template=str(good)))


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model.tokenizer: .* has no tokenizer"):
        load_tokenizer(ModelSpec("x", tokenizer=str(tmp_path)))


# Models


def test_full_fine_tuning_in_the_dtype_asked_for(model_dir: Path) -> None:
    net = load_policy(ModelSpec(str(model_dir)), None)
    assert {p.dtype for p in net.parameters()} == {torch.float32}  # auto: the checkpoint's
    assert len(trainable(net)) == len(list(net.parameters()))
    assert load_policy(ModelSpec(str(model_dir), dtype="bfloat16"), None).dtype == torch.bfloat16


def test_all_dropout_is_off_but_loras(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=32)).save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.attn_pdrop == 0.1
    net = load_policy(ModelSpec(str(tmp_path)), LoraSpec(dropout=0.25))
    rates = {n: m.p for n, m in net.named_modules() if isinstance(m, torch.nn.Dropout)}
    assert {p for n, p in rates.items() if "lora_dropout" in n} == {0.25}
    assert {p for n, p in rates.items() if "lora_dropout" not in n} == {0.0}
    assert (net.config.attn_pdrop, net.config.resid_pdrop, net.config.embd_pdrop) == (0.0, 0.0, 0.0)
    net.train()
    plain = load_policy(ModelSpec(str(tmp_path)), None).train()
    torch.testing.assert_close(logits(plain), logits(plain), rtol=0, atol=0)
    torch.testing.assert_close(logits(net), logits(plain))  # B = 0: LoRA's dropout cannot show yet


def test_functional_dropout_of_the_config_is_off(model_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model_dir, tmp_path / "drops")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}))
    net = load_policy(ModelSpec(str(folder)), None).train()
    assert net.model.layers[0].self_attn.attention_dropout == 0.0


def test_missing_tensors_are_not_made_up(model_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model_dir, tmp_path / "short")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lack 1 tensors that .* first 'model.layers.1.mlp.up_proj.weight'"):
        load_policy(ModelSpec(str(folder)), None)


def test_four_bit_says_what_it_needs(model_dir: Path) -> None:
    spec = ModelSpec(str(model_dir), load_in_4bit=True)
    with pytest.raises(UserError, match=r"4-bit weights cannot be trained; add `lora: {}`"):
        load_policy(spec, None)
    if importlib.util.find_spec("bitsandbytes") is None:
        with pytest.raises(UserError, match=r"model.load_in_4bit: needs the package bitsandbytes; pip install"):
            load_policy(spec, LoraSpec())


@needs_bitsandbytes
def test_qlora_trains_the_adapter_on_a_4_bit_base(tmp_path: Path) -> None:
    model_dir = tiny.make_model(tmp_path / "m", **FOUR_BIT_SIZE)
    net = load_policy(ModelSpec(str(model_dir), load_in_4bit=True), LoraSpec(r=4)).train()
    assert type(net.get_base_model().model.layers[0].mlp.up_proj.base_layer).__name__ == "Linear4bit"
    assert {p.dtype for p in trainable(net).values()} == {torch.float32}
    device = next(net.parameters()).device
    ids = torch.arange(3, 13, device=device)[None]
    net(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in trainable(net).values())
    base = load_frozen(ModelSpec(str(model_dir)))
    gap = (logits(base) - net.eval()(input_ids=ids).logits.cpu()).abs().max()
    assert 1e-4 < gap < 0.5  # quantized, and the same model


# Adapters


@pytest.mark.parametrize("lora", [LoraSpec(r=4), LoraSpec(r=4, use_rslora=True), LoraSpec(r=4, use_dora=True)])
def test_a_new_adapter_starts_as_the_base(model_dir: Path, lora: LoraSpec) -> None:
    net = load_policy(ModelSpec(str(model_dir), dtype="bfloat16"), lora)
    assert {p.dtype for p in trainable(net).values()} == {torch.float32}
    assert {n.split(".")[-4] for n in trainable(net) if "lora_A" in n} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    base = load_frozen(ModelSpec(str(model_dir), dtype="bfloat16"))
    torch.testing.assert_close(logits(net.eval()), logits(base), rtol=0, atol=0.05 if lora.use_dora else 0)
    assert net.peft_config["default"].base_model_name_or_path == str(model_dir.resolve())


def test_unknown_modules_are_named_with_near_ones(model_dir: Path) -> None:
    with pytest.raises(UserError) as e:
        load_policy(ModelSpec(str(model_dir)), LoraSpec(target_modules=("q_proj", "v_prj")))
    assert str(e.value) == (
        "lora.target_modules: no module of the model is named 'v_prj'. Did you mean 'v_proj'? It has: down_proj, "
        "embed_tokens, gate_proj, input_layernorm, k_proj, lm_head, norm, o_proj, post_attention_layernorm, q_proj, "
        "up_proj, v_proj"
    )
    with pytest.raises(UserError, match=r"lora.modules_to_save: no module of the model is named 'head'"):
        load_policy(ModelSpec(str(model_dir)), LoraSpec(modules_to_save=("head",)))
    with pytest.raises(UserError, match=r"lora.target_modules: no module of the model is named '.*foo'"):
        load_policy(ModelSpec(str(model_dir)), LoraSpec(target_modules=".*foo"))
    with pytest.raises(UserError, match=r"^lora: Target module LlamaRMSNorm"):
        load_policy(ModelSpec(str(model_dir)), LoraSpec(target_modules=("norm",)))


def test_patterns_exclusions_and_saved_modules(model_dir: Path) -> None:
    lora = LoraSpec(target_modules=r".*\.layers\.1\..*_proj", exclude_modules=("q_proj",), modules_to_save=("lm_head",))
    names = trainable(load_policy(ModelSpec(str(model_dir)), lora))
    assert any("layers.1.self_attn.k_proj.lora_A" in n for n in names)
    assert not any("layers.0" in n or "q_proj" in n for n in names)
    assert "base_model.model.lm_head.modules_to_save.default.weight" in names


def test_activation_checkpointing_with_lora_has_gradients(model_dir: Path) -> None:
    net = load_policy(ModelSpec(str(model_dir)), LoraSpec(r=2), activation_checkpointing=True).train()
    net.gradient_checkpointing_enable({"use_reentrant": True})
    net(input_ids=torch.arange(3, 13)[None], labels=torch.arange(3, 13)[None]).loss.backward()
    assert all(p.grad is not None for n, p in trainable(net).items() if "lora_B" in n)


@pytest.fixture(scope="module")
def sft(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that someone trained: B != 0."""
    net = load_policy(ModelSpec(str(model_dir)), LoraSpec(r=4, alpha=8, target_modules=("q_proj", "v_proj")))
    torch.manual_seed(1)
    for p in trainable(net).values():
        p.data += 0.1 * torch.randn_like(p)
    folder = tmp_path_factory.mktemp("adapters") / "sft"
    net.save_pretrained(folder)
    return folder


def test_an_adapter_is_continued(model_dir: Path, sft: Path) -> None:
    spec = ModelSpec(str(model_dir), adapter=str(sft))
    net = load_policy(spec, None)
    saved = load_file(sft / "adapter_model.safetensors")
    assert len(trainable(net)) == len(saved)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B"
    assert torch.equal(trainable(net)[f"{key}.default.weight"], saved[f"{key}.weight"])
    frozen = load_frozen(spec)
    assert not trainable(frozen)
    assert torch.equal(logits(frozen), logits(net.eval()))
    assert (logits(frozen) - logits(load_frozen(replace(spec, adapter=None)))).abs().max() > 0.01


def test_a_lora_that_contradicts_the_adapter_is_refused(model_dir: Path, sft: Path) -> None:
    spec = ModelSpec(str(model_dir), adapter=str(sft))
    same = LoraSpec(r=4, alpha=8, target_modules=("v_proj", "q_proj"), dropout=0.5)
    assert load_policy(spec, same).peft_config["default"].lora_dropout == 0.5
    with pytest.raises(UserError) as e:
        load_policy(spec, replace(same, r=16))
    assert str(e.value) == (
        f"lora.r: the recipe says 16, the adapter that the run continues ({sft}) has 4. "
        "Leave `lora` out to continue it as it is"
    )
    with pytest.raises(
        UserError, match=r"lora.target_modules: the recipe says all-linear, .* has \['q_proj', 'v_proj'\]"
    ):
        load_policy(spec, replace(same, target_modules="all-linear"))


def test_adapters_that_do_not_fit(model_dir: Path, sft: Path, tmp_path: Path) -> None:
    other = tiny.make_model(tmp_path / "wide", hidden_size=48)
    with pytest.raises(UserError, match=r"model.adapter: .* does not fit the model .*size mismatch"):
        load_policy(ModelSpec(str(other), adapter=str(sft)), None)
    deep = tiny.make_model(tmp_path / "deep", num_hidden_layers=3)
    with pytest.raises(
        UserError, match=r"does not fit the model .* 4 tensors are only in one of them, first .*layers.2"
    ):
        load_policy(ModelSpec(str(deep), adapter=str(sft)), None)
    with pytest.raises(UserError, match=r"is an adapter. Write its base there and this folder at model.adapter"):
        load_policy(ModelSpec(str(sft)), None)
    with pytest.raises(UserError, match=r"is not an adapter folder: it has no adapter_config.json"):
        load_policy(ModelSpec(str(model_dir), adapter=str(model_dir)), None)


def test_a_pickled_adapter_is_refused(model_dir: Path, sft: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sft, tmp_path / "pickled")
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(UserError, match=r"model.adapter: .* has only pickled weights \(adapter_model.bin\)"):
        load_policy(ModelSpec(str(model_dir), adapter=str(folder)), None)


def test_tied_embeddings_stay_tied_when_trained(tmp_path: Path) -> None:
    folder = tiny.make_model(tmp_path / "tied", tie_word_embeddings=True)
    net = load_policy(ModelSpec(str(folder)), LoraSpec(r=2, modules_to_save=("embed_tokens",)))
    head, embedding = net.get_output_embeddings(), net.get_input_embeddings()
    assert head.modules_to_save["default"].weight is embedding.modules_to_save["default"].weight


def test_zero3_partitions_unless_plainly(model_dir: Path) -> None:
    from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

    alive = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    try:
        assert is_deepspeed_zero3_enabled()
        with plainly():
            assert not is_deepspeed_zero3_enabled()
            net = load_frozen(ModelSpec(str(model_dir)))
        assert is_deepspeed_zero3_enabled()
        assert all(p.numel() > 0 for p in net.parameters())
    finally:
        del alive


@pytest.mark.skipif(not STORIES.is_dir(), reason="the model stories260k is not here")
def test_a_real_model_reads_english() -> None:
    spec = ModelSpec(str(STORIES))
    tokenizer, net = load_tokenizer(spec), load_policy(spec, LoraSpec()).eval()
    ids = torch.tensor([tokenizer("<s>Once upon a time, there was a little girl", add_special_tokens=False).input_ids])
    with torch.no_grad():
        assert net(input_ids=ids, labels=ids).loss < 2.0
