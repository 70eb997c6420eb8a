"""Other people's names for what a recipe that samples says: TRL's, and a few of OpenRLHF's and verl's. Tables only;
`po.aliases` has them among its own, and `po.recipe.grpo` does what a table cannot.
"""

from __future__ import annotations

from typing import Any

from po.moves import Loss, Move

MOVED: dict[str, Move] = {
    "n_samples_per_prompt": Move("rollout.num_generations"),  # OpenRLHF
    "generate_max_len": Move("rollout.max_completion_length"),
    "prompt_max_len": Move("data.max_prompt_length"),
    "shuffle_dataset": Move("train.train_sampling_strategy", lambda on: "random" if on else "sequential"),
}

_SERVER = "a vLLM server has its own options; docs/rollouts.md starts one"
_JOURNAL = "po keeps every sample, with its rewards, in the run's folder rollouts"

DROPPED: dict[str, str] = {
    "vllm_gpu_memory_utilization": _SERVER,
    "vllm_tensor_parallel_size": _SERVER,
    "vllm_max_model_length": _SERVER,
    "vllm_max_model_len": _SERVER,
    "vllm_model_impl": _SERVER,
    "vllm_enable_sleep_mode": _SERVER,
    "vllm_server_timeout": "po waits 240 seconds for a server",
    "log_completions": _JOURNAL,
    "log_unique_prompts": _JOURNAL,
    "num_completions_to_print": _JOURNAL,
    "log_multimodal": _JOURNAL,
    "cache_implementation": "po chooses the cache that it samples with",
}

_ENTROPY = "po's heads have no entropy term"
_DISTRIBUTION = "po samples from softmax(logits / temperature) cut by top_p and top_k, and nothing else shapes it"
_SECTION = "po does not read verl's sections; write `rollout`, `loss` and `train` (docs/recipes.md)"

REFUSED: dict[str, str] = {
    "mask_truncated_completions": "po trains on cut responses as on all others; give them less reward, e.g. with "
    "`{verifier: soft_overlong}`",
    "top_entropy_quantile": "po's heads take every token",
    "entropy_coef": _ENTROPY,
    "use_adaptive_entropy": _ENTROPY,
    "off_policy_mask_threshold": "po masks no responses; `rollout.correction` weighs them",
    "use_bias_correction_kl": "grpo_kl's k3 is not multiplied with the ratio; write false, which is GRPO's paper",
    "multi_objective_aggregation": "po adds up weight x reward first; rewards that read their group are in "
    "docs/rewards.md",
    "generation_batch_size": "write rollout.steps_per_generation, the optimizer steps sampled for at once",
    "num_generations_eval": "a run that samples has no evaluation rows of its own",
    "min_p": _DISTRIBUTION,
    "repetition_penalty": _DISTRIBUTION,
    "generation_kwargs": _DISTRIBUTION,
    "chat_template_kwargs": "write them in the rows: a field chat_template_kwargs",
    "ds3_gather_for_generation": "po gathers the weights to sample under ZeRO-3; use ZeRO-2, LoRA or rollout.server",
    "vllm_importance_sampling_clip_min": "po's weights have an upper limit alone, rollout.correction_cap",
    "vllm_structured_outputs_regex": _DISTRIBUTION,
    "vllm_guided_decoding_regex": _DISTRIBUTION,
    "vllm_group_port": "po's port for weights is 51216",
    "use_transformers_continuous_batching": "po samples with the policy itself, or from rollout.server",
    "use_transformers_paged": "po samples with the policy itself, or from rollout.server",
    "environment_factory": "po samples one response to each prompt, without tools in between",
    "max_tool_calling_iterations": "po samples one response to each prompt, without tools in between",
    # OpenRLHF and verl
    "advantage_estimator": "write the head: gae is `ppo`, reinforce `reinforce_pp`, reinforce_baseline `{head: "
    "reinforce_pp, baseline: group}`, rloo `rloo`, group_norm `grpo`, dr_grpo `dr_grpo`; their defaults differ",
    "remote_rm_url": "write `rollout: {rewards: {url: ...}}`; docs/rewards.md says what po sends and expects",
    "init_kl_coef": "write the head's beta: in the reward for `ppo`, `rloo` and `reinforce_pp`, a loss for `grpo_kl`",
    "actor_rollout_ref": _SECTION,
    "algorithm": _SECTION,
    "trl": "write the entries of this section at the top level, as TRL has them",  # axolotl
}

HARMLESS: dict[str, tuple[Any, ...]] = {
    "top_entropy_quantile": (1.0,),
    "multi_objective_aggregation": ("sum_then_normalize",),
    "repetition_penalty": (1.0,),
    "ds3_gather_for_generation": (True,),
    "vllm_group_port": (51216,),
    "sapo_temperature_pos": (1.0,),
    "sapo_temperature_neg": (1.05,),
    "vespo_k_pos": (2.0,),
    "vespo_lambda_pos": (3.0,),
    "vespo_k_neg": (3.0,),
    "vespo_lambda_neg": (2.0,),
}

_EPS = (("eps", 1e-4),)
_BNPO = (
    "po's mean over tokens is over the whole step, TRL's bnpo over each micro-batch alone: the same where that is the "
    "whole step"
)
_DR = "po's dr_grpo never divides by the standard deviation; TRL does unless `scale_rewards: none` stands beside it"
_KL = "the KL term is GRPO's; TRL 1.16 multiplies it with the ratio unless `use_bias_correction_kl: false`"
_LUSPO = "as in the paper and with `importance_sampling_level: sequence`, which TRL does not set by itself"
_VESPO = "corrections of the sampler's imprecision multiply each token's term; in TRL they are part of the weight"

LOSSES: dict[str, Loss] = {  # TRL's loss_type; eps stands beside its standard deviations
    "grpo": Loss("grpo", _EPS),
    "grpo_kl": Loss("grpo_kl", _EPS, _KL),
    "gspo": Loss("gspo", _EPS),
    "bnpo": Loss("dapo", _EPS, _BNPO),
    "dapo": Loss("dapo", _EPS),
    "dr_grpo": Loss("dr_grpo", (), _DR),
    "cispo": Loss("cispo", (*_EPS, ("epsilon_low", 1.0))),
    "sapo": Loss("sapo", _EPS),
    "luspo": Loss("luspo", _EPS, _LUSPO),
    "vespo": Loss("vespo", _EPS, _VESPO),
}

HYPERPARAMETERS: dict[tuple[str, str], Move] = {
    ("sapo", "sapo_temperature_pos"): Move("tau_pos"),
    ("sapo", "sapo_temperature_neg"): Move("tau_neg"),
    ("vespo", "vespo_k_pos"): Move("k_pos"),
    ("vespo", "vespo_lambda_pos"): Move("lambda_pos"),
    ("vespo", "vespo_k_neg"): Move("k_neg"),
    ("vespo", "vespo_lambda_neg"): Move("lambda_neg"),
}
