"""Other people's recipes: names translated and said so, different losses told apart, the rest refused with a reason."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from po.errors import UserError
from po.heads.discopop import DiscoPOP
from po.heads.dpo import DPO
from po.heads.dpo_norm import DPONorm
from po.heads.exo_pref import EXOPref
from po.heads.ipo import IPO
from po.heads.kto import KTO
from po.heads.nca import NCA
from po.heads.orpo import ORPO
from po.heads.rdpo import RDPO
from po.heads.sft import SFT
from po.heads.simpo import SimPO
from po.recipe import load
from po.spec import LoraSpec, Source, Term
from po.types import Head

BASE = "model: m\ndata: pairs.jsonl\noutput_dir: runs/x\n"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "theirs.yaml"
    path.write_text(text, "utf-8")
    return path


def test_trl_with_transformers_4_names(tmp_path: Path) -> None:
    recipe, notes = load(
        write(
            tmp_path,
            """
model_name_or_path: Qwen/Qwen2.5-0.5B
torch_dtype: torch.bfloat16
attn_implementation: flash_attention_2
dataset_name: trl-lib/ultrafeedback_binarized
dataset_num_proc: 4
loss_type: [sigmoid, sft]
loss_weights: [1.0, 0.2]
beta: 0.2
max_length: 1024
max_prompt_length: 512
use_peft: true
lora_r: 8
lora_alpha: 16
lora_dropout: 0.05
lora_target_modules: [q_proj, v_proj]
precompute_ref_log_probs: true
learning_rate: 5.0e-6
evaluation_strategy: steps
warmup_ratio: 0.1
gradient_checkpointing: true
gradient_checkpointing_kwargs: {use_reentrant: false}
overwrite_output_dir: true
save_safetensors: true
logging_dir: logs
group_by_length: true
load_in_8bit: false
bf16: true
seed: 1
output_dir: out
""",
        )
    )
    assert (recipe.model.name_or_path, recipe.model.dtype) == ("Qwen/Qwen2.5-0.5B", "bfloat16")
    assert recipe.data.train == (Source("trl-lib/ultrafeedback_binarized", split="train"),)
    assert recipe.data.eval == (Source("trl-lib/ultrafeedback_binarized", split="test"),)
    assert (recipe.data.max_length, recipe.data.max_prompt_length, recipe.data.num_proc) == (1024, 512, 4)
    assert recipe.loss == (Term(DPO(beta=0.2), 1.0), Term(SFT(), 0.2))
    assert recipe.lora == LoraSpec(r=8, alpha=16, dropout=0.05, target_modules=("q_proj", "v_proj"))
    assert recipe.reference.kind == "cached"
    wanted = {"learning_rate": 5e-6, "eval_strategy": "steps", "warmup_steps": 0.1, "activation_checkpointing": True}
    wanted |= {"activation_checkpointing_kwargs": {"use_reentrant": False}, "bf16": True}
    assert {k: recipe.train[k] for k in wanted} == wanted
    for note in (
        "torch_dtype: translated to model.dtype: 'bfloat16'",
        "warmup_ratio: translated to train.warmup_steps: 0.1 (a number below 1 is a share of the steps)",
        "evaluation_strategy: translated to train.eval_strategy: 'steps'",
        "overwrite_output_dir: has no effect; po continues a run only where the recipe says `resume: true`",
        "save_safetensors: has no effect; po writes safetensors always",
        "load_in_8bit: false asks for nothing and is left out",
        "loss[0]: the loss 'sigmoid' is po's head 'dpo'",
        "beta: translated to loss[0].beta: 0.2",
    ):
        assert note in notes
    assert len(notes) == len(set(notes)) >= 24


def test_llama_factory(tmp_path: Path) -> None:
    recipe, notes = load(
        write(
            tmp_path,
            """
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
trust_remote_code: false
stage: dpo
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
pref_beta: 0.1
pref_loss: sigmoid
pref_ftx: 0.2
dataset: data/dpo_en_demo.json
cutoff_len: 2048
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
output_dir: saves/llama3-8b/lora/dpo
plot_loss: true
resume_from_checkpoint: null
per_device_train_batch_size: 1
""",
        )
    )
    assert recipe.data.train == (Source("data/dpo_en_demo.json", limit=1000),)
    assert recipe.lora == LoraSpec(r=8)
    assert recipe.loss == (Term(DPO(beta=0.1)), Term(SFT(), 0.2))
    assert recipe.resume is False
    assert any(
        n.startswith("finetuning_type: 'lora' is po's section `lora`; what it leaves out has po's") for n in notes
    )
    assert any(n.startswith("pref_ftx: translated to a second term of the loss") for n in notes)


def test_axolotl(tmp_path: Path) -> None:
    recipe, notes = load(
        write(
            tmp_path,
            """
base_model: NousResearch/Llama-3.2-1B
load_in_8bit: false
rl: ipo
rl_beta: 0.2
datasets:
  - {path: fozziethebeat/alpaca_messages_2k_dpo_test, type: chat_template.default, split: train}
adapter: qlora
lora_r: 32
lora_target_linear: true
sequence_len: 4096
sample_packing: false
micro_batch_size: 4
num_epochs: 2
optimizer: adamw_8bit
lr_scheduler: cosine
flash_attention: true
val_set_size: 0.0
wandb_project: ""
special_tokens: {}
output_dir: outputs
""",
        )
    )
    assert recipe.loss == (Term(IPO(tau=0.2, length_normalize=True)),)
    assert (recipe.model.load_in_4bit, recipe.lora) == (True, LoraSpec(r=32))
    assert recipe.data.train == (Source("fozziethebeat/alpaca_messages_2k_dpo_test", split="train"),)
    wanted = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2.0,
        "optim": "adamw_8bit",
        "lr_scheduler_type": "cosine",
    }
    assert {k: recipe.train[k] for k in wanted} == wanted
    assert recipe.train["report_to"] == "none"
    assert "datasets[0].type: has no effect; po detects the rows' format and says which it found" in notes


def test_alignment_handbook(tmp_path: Path) -> None:
    text = BASE.replace("data: pairs.jsonl\n", "dataset_mixer: {a/b: 1.0}\ndataset_splits: [train_prefs, test_prefs]\n")
    recipe, _ = load(write(tmp_path, text + "beta: 0.01\n"))
    assert recipe.data.train == (Source("a/b", split="train_prefs"),)
    assert recipe.data.eval == (Source("a/b", split="test_prefs"),)
    assert recipe.loss == (Term(DPO(beta=0.01)),)


@pytest.mark.parametrize(
    ("text", "note"),
    [
        (
            "loss_type: ipo",
            "TRL, LLaMA-Factory and HALOs average over tokens, so length_normalize is set; the paper and Op",
        ),
        (
            "loss_type: nca_pair",
            "alpha 1e4 makes the labels one-hot, as in TRL; po's head reads a reward on every response",
        ),
        ("loss_type: sft", "po averages over all tokens of the step; TRL averages the means of its micro-batches"),
        (
            "loss_type: sigmoid\nlabel_smoothing: 0.1",
            "TRL 1.16 ignores label_smoothing and trains plain DPO; po applies it",
        ),
        ("loss: {type: sigmoid, label_smoothing: 0.1}", "TRL 1.16 ignores label_smoothing and trains plain DPO"),
        ("loss: {head: infonca, temperature_alpha: 0.5}", "alpha is the inverse of the authors' temperature"),
        ("beta: 0.1\nrpo_alpha: 0.5", "the peers average over each response's tokens first"),
        (
            "loss: dpo\ntruncation_mode: keep_end",
            "TRL cuts the whole sequence; po cuts the response (or the prompt's start)",
        ),
        ("loss: dpo\ndisable_dropout: true", "has no effect; po trains without the base model's dropout always"),
        ("loss: dpo\nlora: {use_dora: true}", "vLLM does not load DoRA adapters; export with `po export RUN --merged`"),
        (
            "loss: sft\ndata: {train: x, pairing: all}",
            "data.pairing: 'all' has no effect, because no head of the recipe takes",
        ),
        (
            "loss: dpo\nuse_peft: false\nlora_r: 8",
            "so the recipe's LoRA settings are left out and all weights are trained",
        ),
    ],
)
def test_where_names_differ_the_note_says_how(tmp_path: Path, text: str, note: str) -> None:
    base = BASE.replace("data: pairs.jsonl\n", "") if "data:" in text else BASE
    _, notes = load(write(tmp_path, base + text + "\n"))
    assert any(note in n for n in notes), notes


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_project_switches_the_tracker_on(tmp_path: Path) -> None:
    recipe, notes = load(write(tmp_path, BASE + "loss: dpo\nwandb_project: x\n"))
    assert recipe.train["report_to"] == ["wandb"]
    assert notes == ["wandb_project: translated to train.report_to: [wandb]; set the project with WANDB_PROJECT=x"]


@pytest.mark.parametrize(
    ("text", "head"),
    [
        ("loss_type: robust\nlabel_smoothing: 0.2", RDPO(epsilon=0.2)),
        ("loss_type: simpo\nbeta: 2.5\nsimpo_gamma: 1.2\ncpo_alpha: 0.0", SimPO(beta=2.5, gamma=1.2)),
        ("loss_type: orpo\nbeta: 0.3", ORPO(lam=0.3)),
        ("loss_type: kto\ndesirable_weight: 1.33\nundesirable_weight: 1.0", KTO(lambda_d=1.33)),
        ("loss_type: exo_pair\nbeta: 0.2\nlabel_smoothing: 0.01", EXOPref(beta_pi=0.2, epsilon=0.01)),
        ("loss_type: discopop\nbeta: 0.05\ndiscopop_tau: 0.1", DiscoPOP(beta=0.05, tau=0.1)),
        ("loss_type: sigmoid_norm\nbeta: 5", DPONorm(beta=5.0)),
    ],
)
def test_flat_losses_of_peers(tmp_path: Path, text: str, head: Head) -> None:
    recipe, _ = load(write(tmp_path, BASE + text + "\n"))
    assert recipe.loss == (Term(head),)


def test_heads_behind_peers_names(tmp_path: Path) -> None:
    text = BASE + "loss: [{type: nca_pair, beta: 0.05}, {name: ipo, beta: 0.2}]\n"
    recipe, _ = load(write(tmp_path, text))
    assert recipe.loss == (Term(NCA(beta=0.05, alpha=1e4)), Term(IPO(tau=0.2)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("loss_type: hunge", "loss[0].head (given as loss_type: 'hunge'): no head is called 'hunge'."),
        (
            "loss_type: dpo\nloss: dpo",
            "loss_type: is another name of `loss`, which the recipe gives as well; keep one of them.",
        ),
        (
            "loss: {head: dpo, beta: 0.1}\nbeta: 0.2",
            "beta: is another name of loss[0].beta, which the recipe gives as well;",
        ),
        ("loss: sft\nbeta: 0.2", "beta: no head of the recipe (sft) has a hyperparameter 'beta'."),
        (
            "loss_type: [dpo, sft]\nloss_weights: [1]",
            "loss_weights: expected a weight for each of the 2 terms of the loss, got [1]",
        ),
        (
            "loss: dpo\nld_alpha: 0.5",
            "ld_alpha: cannot be translated: write the head: `loss: {head: ld_dpo}`; peers apply",
        ),
        (
            "loss: dpo\nload_in_8bit: true",
            "load_in_8bit: cannot be translated: po trains in 16 or 32 bits, or in 4 bits with",
        ),
        (
            "loss: dpo\nf_divergence_type: js",
            "f_divergence_type: cannot be translated: write the head: `loss: {head: fdpo, divergence: js}`.",
        ),
        (
            "loss: dpo\nsync_ref_model: true",
            "sync_ref_model: cannot be translated: po's reference does not move during a run.",
        ),
        (
            "loss: dpo\ntemplate: llama3",
            "template: cannot be translated: po renders with the tokenizer's own chat template;",
        ),
        ("loss: dpo\nval_set_size: 0.1", "val_set_size: cannot be translated: po does not split files at random:"),
        ("loss: dpo\nstage: ppo", "stage: cannot be translated: po has no stage 'ppo'; it trains the heads of `loss`."),
        (
            "loss: dpo\nfinetuning_type: freeze",
            "finetuning_type: cannot be translated: po trains with `lora` or in full, not",
        ),
        (
            "loss: dpo\nquantization_bit: 8",
            "quantization_bit: cannot be translated: po quantises to 4 bits only, got 8.",
        ),
        (
            "loss: dpo\ndisable_dropout: false",
            "disable_dropout: cannot be translated: po trains without the base model's dropout",
        ),
        (
            "loss: dpo\nresume_from_checkpoint: ckpt-5",
            "resume_from_checkpoint: cannot be translated: po finds the newest sound",
        ),
        (
            "loss: dpo\npush_to_hub: true",
            "push_to_hub: cannot be translated: export the run (`po export`) and upload the folder.",
        ),
        (
            "loss: dpo\nmodel_name_or_path: x",
            "model_name_or_path: is another name of model.name_or_path, which the recipe gives",
        ),
        (
            "loss: dpo\ndataset_train_split: x",
            "dataset_train_split: says a part of a dataset that is not named: dataset_name",
        ),
        (
            "loss: dpo\ndataset: dpo_en_demo",
            "dataset: cannot be translated: 'dpo_en_demo' is no path and no hub name (po reads no",
        ),
        (
            "loss: dpo\nmax_completion_length: 9",
            "po limits prompt + response (data.max_length) and the prompt (data.max_prompt_l",
        ),
        ("loss: dpo\nlora_r: 0", "lora.r (given as lora_r): expected a whole number >= 1, got 0."),
        ("loss: dpo\nlora_rnk: 0", "lora_rnk: unknown key. Did you mean 'lora_rank'?"),
        (
            "loss: dpo\ntrain: {warmup_ratio: 0.1, warmup_steps: 5}",
            "train.warmup_ratio: is another name of train.warmup_steps,",
        ),
        (
            "loss: {head: ipo, tau: 1, beta: 1}",
            "loss[0].beta: is another name of tau, which the recipe gives as well; keep one",
        ),
    ],
)
def test_what_cannot_be_translated_says_why(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, BASE + text + "\n")
    with pytest.raises(UserError) as e:
        load(path)
    assert str(e.value).startswith(f"{path}: ")
    assert message in str(e.value)
