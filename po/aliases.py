"""Other people's names for what a recipe says: TRL's, LLaMA-Factory's, axolotl's, ms-swift's, the alignment-handbook's
and transformers 4's. Tables only; `po.recipe.translate` applies them and says so.

A name is looked up at the top level, and inside a section where its new place is in that section: `lora_r` at the top
and `lora: {lora_r: 8}` both become `lora.r`.
"""

from __future__ import annotations

from typing import Any

from po import aliases_online as online
from po.moves import Loss, Move


def _dtype(value: Any) -> Any:
    short = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}
    name = str(value).removeprefix("torch.")
    return short.get(name, name)


def _modules(value: Any) -> Any:
    if value in ("all", ["all"], "all_linear", ["all-linear"]):
        return "all-linear"
    return [m.strip() for m in value.split(",")] if isinstance(value, str) and "," in value else value


def _overlong(value: Any) -> Any:
    known = {"keep_start": "truncate_response", "keep_end": "truncate_prompt", "truncate": "truncate_response"}
    return {**known, "raise": "error"}.get(str(value), value)


_CUT = "TRL cuts the whole sequence; po cuts the response (or the prompt's start) and counts and lists what it cut"

MOVED: dict[str, Move] = {
    # model
    "model_name_or_path": Move("model.name_or_path"),
    "base_model": Move("model.name_or_path"),
    "model_revision": Move("model.revision"),
    "revision_of_model": Move("model.revision"),
    "dtype": Move("model.dtype", _dtype),
    "torch_dtype": Move("model.dtype", _dtype),
    "tokenizer_name_or_path": Move("model.tokenizer"),
    "tokenizer_config": Move("model.tokenizer"),
    "trust_remote_code": Move("model.trust_remote_code"),
    "adapter_name_or_path": Move("model.adapter"),
    "lora_model_dir": Move("model.adapter"),
    "load_in_4bit": Move("model.load_in_4bit"),
    "chat_template_path": Move("model.chat_template"),
    # lora
    "lora_r": Move("lora.r"),
    "lora_rank": Move("lora.r"),
    "lora_alpha": Move("lora.alpha"),
    "lora_dropout": Move("lora.dropout"),
    "lora_target_modules": Move("lora.target_modules", _modules),
    "lora_target": Move("lora.target_modules", _modules),
    "target_modules": Move("lora.target_modules", _modules),
    "lora_modules_to_save": Move("lora.modules_to_save"),
    "modules_to_save": Move("lora.modules_to_save"),
    "additional_target": Move("lora.modules_to_save", _modules),
    "use_rslora": Move("lora.use_rslora"),
    "peft_use_rslora": Move("lora.use_rslora"),
    "use_dora": Move("lora.use_dora"),
    "peft_use_dora": Move("lora.use_dora"),
    # data
    "max_length": Move("data.max_length"),
    "cutoff_len": Move("data.max_length"),
    "sequence_len": Move("data.max_length"),
    "max_prompt_length": Move("data.max_prompt_length"),
    "truncation_mode": Move("data.overlong", _overlong, _CUT),
    "excess_length_strategy": Move("data.overlong", _overlong),
    "dataset_num_proc": Move("data.num_proc"),
    "preprocessing_num_workers": Move("data.num_proc"),
    "dataset_processes": Move("data.num_proc"),
    # reference
    "source": Move("reference.from"),
    "ref_model": Move("reference.from"),
    "ref_model_name_or_path": Move("reference.from"),
    # train
    "warmup_ratio": Move("train.warmup_steps", None, "a number below 1 is a share of the steps"),
    "evaluation_strategy": Move("train.eval_strategy"),
    "gradient_checkpointing": Move("train.activation_checkpointing"),
    "gradient_checkpointing_kwargs": Move("train.activation_checkpointing_kwargs"),
    "per_gpu_train_batch_size": Move("train.per_device_train_batch_size"),
    "per_gpu_eval_batch_size": Move("train.per_device_eval_batch_size"),
    "micro_batch_size": Move("train.per_device_train_batch_size"),
    "eval_batch_size": Move("train.per_device_eval_batch_size"),
    "num_epochs": Move("train.num_train_epochs"),
    "optimizer": Move("train.optim"),
    "lr_scheduler": Move("train.lr_scheduler_type"),
    "auto_resume_from_checkpoints": Move("resume"),
    **online.MOVED,
}

# Names that ask for what po does anyway, or that no longer mean anything: taken out, and said so.
DROPPED: dict[str, str] = {
    "overwrite_output_dir": "po continues a run only where the recipe says `resume: true`",
    "overwrite_cache": "po's caches are keyed by their content",
    "save_safetensors": "po writes safetensors always",
    "logging_dir": "the tracker's own environment variables say where it writes; metrics.jsonl is in output_dir",
    "group_by_length": "po packs sequences without padding, so there is nothing to gain from grouping lengths",
    "length_column_name": "po packs sequences without padding, so there is nothing to gain from grouping lengths",
    "packing": "po always packs sequences without padding",
    "padding_free": "po always packs sequences without padding",
    "sample_packing": "po always packs sequences without padding",
    "eval_sample_packing": "po always packs sequences without padding",
    "pad_to_sequence_len": "po always packs sequences without padding",
    "pad_to_multiple_of": "po always packs sequences without padding",
    "padding_value": "po always packs sequences without padding",
    "attn_implementation": "po brings its own attention for packed prompts: FlexAttention on a GPU, SDPA on a CPU",
    "flash_attention": "po brings its own attention for packed prompts: FlexAttention on a GPU, SDPA on a CPU",
    "flash_attn": "po brings its own attention for packed prompts: FlexAttention on a GPU, SDPA on a CPU",
    "use_liger_kernel": "po's log-prob routine never builds the (positions, vocabulary) logits",
    "use_liger_loss": "po's log-prob routine never builds the (positions, vocabulary) logits",
    "use_logits_to_keep": "po's log-prob routine never builds the (positions, vocabulary) logits",
    "use_fast_tokenizer": "po takes the fast tokenizer where there is one",
    "precompute_ref_batch_size": "po chooses it",
    "use_reentrant_checkpointing": "po chooses it",
    "do_train": "`po train` trains",
    "do_eval": "po evaluates where data.eval is given",
    "plot_loss": "the curves are in metrics.jsonl and in the tracker",
    "is_preference_dataset": "po detects the format of the rows",
    "bnb_4bit_compute_dtype": "po computes 4-bit layers in the model's dtype",
    "lora_task_type": "po trains causal language models",
    "strict": "po's recipes are always strict",
    **online.DROPPED,
}

_SPLIT = "po does not split files at random: write the evaluation rows to a file of their own and name it at data.eval"
_REFERENCE_STAYS = "po's reference does not move during a run"
_NO_8BIT = "po trains in 16 or 32 bits, or in 4 bits with `model.load_in_4bit`"

# Names that ask for something else than po does. With an empty value (null, false, 0, []) they ask for nothing.
REFUSED: dict[str, str] = {
    "load_in_8bit": _NO_8BIT,
    "ld_alpha": "write the head: `loss: {head: ld_dpo}`; peers apply it to different sides (policy, or both)",
    "f_divergence_type": "write the head: `loss: {head: fdpo, divergence: js}`",
    "f_alpha_divergence_coef": "write `loss: {head: fdpo, divergence: alpha}` with `alpha` 1 - TRL's coefficient",
    "use_weighting": "write the head: `loss: {head: wpo}`",
    "gamma_beta_ratio": "po's simpo takes the margin itself: gamma = gamma_beta_ratio * beta",
    "pref_bco_weight": "the head 'bco' takes labelled responses, not pairs, so it is no term beside DPO",
    "sync_ref_model": _REFERENCE_STAYS,
    "ref_model_mixup_alpha": _REFERENCE_STAYS,
    "ref_model_sync_steps": _REFERENCE_STAYS,
    "ref_model_adapters": "name the folder of the reference's adapter at reference.from",
    "ref_adapter_name_or_path": "name the folder of the reference's adapter at reference.from",
    "max_completion_length": "po limits prompt + response (data.max_length) and the prompt (data.max_prompt_length)",
    "template": "po renders with the tokenizer's own chat template; another is a Jinja file at model.chat_template",
    "val_size": _SPLIT,
    "val_set_size": _SPLIT,
    "dataset_dir": "po looks no names up in dataset_info.json: give the files at data.train",
    "dataset_streaming": "po tokenizes the rows once and maps them into memory",
    "streaming": "po tokenizes the rows once and maps them into memory",
    "activation_offloading": "lower per_device_train_batch_size, or use train.activation_checkpointing",
    "model_init_kwargs": "write its entries under `model:` (dtype, revision, trust_remote_code)",
    "router_aux_loss_coef": "po adds no load-balancing loss; its objective is exactly the sum of `loss`",
    "pissa_init": "po starts LoRA at zero, so that the policy of step 0 is its reference",
    "loraplus_lr_ratio": "po trains all LoRA parameters at one learning rate",
    "special_tokens": "set them in the tokenizer's files: they belong to the model",
    "tokens": "set them in the tokenizer's files: they belong to the model",
    "evals_per_epoch": "use train.eval_steps; a number below 1 is a share of the whole run",
    "saves_per_epoch": "use train.save_steps; a number below 1 is a share of the whole run",
    "early_stopping_patience": "po has no early stopping; look at eval_loss in metrics.jsonl",
    "train_batch_size": "po counts per device: train.per_device_train_batch_size and gradient_accumulation_steps",
    "pure_bf16": "use `model: {dtype: bfloat16}`",
    "hf_hub_token": "put it into the environment variable HF_TOKEN: a recipe is copied into the run's folder",
    **online.REFUSED,
}

# The few of the above that have a value which asks for what po does.
HARMLESS: dict[str, tuple[Any, ...]] = {
    "f_divergence_type": ("reverse_kl",),
    "f_alpha_divergence_coef": (0.5,),
    "discopop_tau": (0.05,),
    "simpo_gamma": (0.5,),
    "cpo_alpha": (1.0,),
    "ref_model_mixup_alpha": (0.6,),
    "ref_model_sync_steps": (512,),
    "router_aux_loss_coef": (0.001,),
    "desirable_weight": (1.0,),
    "undesirable_weight": (1.0,),
    **online.HARMLESS,
}


SMOOTHING = "TRL 1.16 ignores label_smoothing and trains plain DPO; po applies it (conservative DPO)"
_MEAN = "TRL, LLaMA-Factory and HALOs average over tokens, so length_normalize is set; the paper and OpenRLHF sum"
_NCA = (
    "alpha 1e4 makes the labels one-hot, as in TRL; po's head reads a reward on every response, so give the better "
    "one 1 and the worse one 0"
)
_SFT = "po averages over all tokens of the step; TRL averages the means of its micro-batches"

_TOKENS = "its likelihood term averages each response over its tokens; TRL averages over a micro-batch's tokens"

LOSSES: dict[str, Loss] = {
    "sigmoid": Loss("dpo"),
    "dpo": Loss("dpo"),
    "ipo": Loss("ipo", (("length_normalize", True),), _MEAN),
    "nca_pair": Loss("nca", (("alpha", 1e4),), _NCA),
    "apo_zero": Loss("apo_zero"),
    "apo_down": Loss("apo_down"),
    "sft": Loss("sft", differs=_SFT),
    "robust": Loss("rdpo"),
    "exo_pair": Loss("exo_pref"),
    "sigmoid_norm": Loss("dpo_norm"),
    "tpo-l": Loss("tpo_l", differs=_TOKENS),
    "cpo": Loss("cpo", differs=_TOKENS),
    "orpo": Loss("orpo", differs=_TOKENS),
    **online.LOSSES,
}

# What people call a head's hyperparameter: (head, their name) -> ours.
HYPERPARAMETERS: dict[tuple[str, str], Move] = {
    ("ipo", "beta"): Move("tau"),
    ("infonca", "temperature_alpha"): Move(
        "alpha", lambda t: 1 / t, "alpha is the inverse of the authors' temperature"
    ),
    ("rdpo", "label_smoothing"): Move("epsilon"),
    ("exo_pref", "beta"): Move("beta_pi"),
    ("exo_pref", "label_smoothing"): Move("epsilon"),
    ("dpop", "dpop_lambda"): Move("lam"),
    ("orpo", "beta"): Move("lam", None, "TRL calls ORPO's lambda beta"),
    ("orpo", "orpo_alpha"): Move("lam"),
    ("kto", "desirable_weight"): Move("lambda_d"),
    ("kto", "undesirable_weight"): Move("lambda_u"),
    ("apo_zero_unpaired", "desirable_weight"): Move("lambda_d"),
    ("apo_zero_unpaired", "undesirable_weight"): Move("lambda_u"),
    ("discopop", "discopop_tau"): Move("tau"),
    ("simpo", "simpo_gamma"): Move("gamma"),
    ("alphapo", "simpo_gamma"): Move("gamma"),
    ("cpo", "cpo_alpha"): Move("alpha"),
    ("tpo_triple", "tpo_alpha"): Move("alpha"),
    ("tpo_l", "tpo_alpha"): Move("alpha"),
    ("nca", "temperature_alpha"): Move("alpha", lambda t: 1 / t, "alpha is the inverse of the authors' temperature"),
    **online.HYPERPARAMETERS,
}

# Top-level names that speak of the loss: what they say. Those of GRPO's clip are `po.recipe.grpo`'s.
LOSS_KEYS: dict[str, str] = {
    "loss_type": "type",
    "pref_loss": "type",
    "rl": "type",
    "loss_weights": "weights",
    "beta": "beta",
    "pref_beta": "beta",
    "rl_beta": "beta",
    "dpo_beta": "beta",
    "label_smoothing": "label_smoothing",
    "dpo_label_smoothing": "label_smoothing",
    **{name: name for _, name in HYPERPARAMETERS if name not in ("beta", "label_smoothing")},
    "pref_ftx": "sft",
    "rpo_alpha": "sft",
}
