"""Every causal language model of transformers that shares prompts exactly, as far as tried (docs/numerics.md).

pytest -m slow tests/test_families.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import Float64, V, furthest, gradients, plain, ragged
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from po.forest import plant
from po.logprob import install, score
from po.sharing import problem, share, verify

SIZES: dict[str, Any] = {
    **{"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": V},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 256},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    # mixtures of experts
    **{"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "first_k_dense_replace": 1},
    **{"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2},
    **{"n_group": 1, "topk_group": 1},
    # latent attention
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16},
    # the older names
    **{"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 256, "n_inner": 96, "ffn_dim": 96},
    **dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop", "attention_dropout"), 0.0),
    **dict.fromkeys(("hidden_dropout", "dropout", "activation_dropout", "residual_dropout"), 0.0),
    **{"word_embed_proj_dim": 48},
}
_WINDOW: dict[str, Any] = {"sliding_window": 6}
_QWEN: dict[str, Any] = {"sliding_window": 6, "use_sliding_window": True, "max_window_layers": 1}
_LATENT: dict[str, Any] = {"head_dim": None, "num_key_value_heads": 4}
# What differs from SIZES; None removes.
DIFFERS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("mistral", "ministral", "ministral3", "mixtral", "gemma2", "gemma3_text", "phi3"), _WINDOW),
    **dict.fromkeys(("starcoder2", "cohere2", "olmo3", "exaone4", "afmoe"), _WINDOW),
    **dict.fromkeys(("qwen2", "qwen3", "qwen3_moe", "smollm3"), _QWEN),
    **dict.fromkeys(("deepseek_v3", "axk1", "glm4_moe_lite", "youtu"), _LATENT),
    "dots1": {"n_shared_experts": 1},
    "biogpt": {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0},
}
EXACT = [
    *("afmoe", "apertus", "arcee", "aria_text", "axk1", "beam", "biogpt", "bitnet", "cohere", "cohere2"),
    *("cohere2_moe", "ctrl", "cwm", "deepseek_v2", "deepseek_v3", "diffllama", "dots1", "ernie4_5", "ernie4_5_moe"),
    *("exaone4", "exaone_moe", "flex_olmo", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "glm4_moe"),
    *("glm4_moe_lite", "gpt-sw3", "gpt2", "gpt_bigcode", "gpt_neox", "granite", "granitemoe", "granitemoeshared"),
    *("helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3", "hyperclovax", "internlm3", "iquestcoder", "jais2"),
    *("jetmoe", "kolibri1", "laguna", "llama", "mellum", "minicpm3", "minimax_m2", "ministral", "ministral3"),
    *("mistral", "mixtral", "nanochat", "olmo", "olmo2", "olmo3", "olmoe", "opt", "persimmon", "phi", "phi3"),
    *("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "solar_open", "starcoder2", "vaultgemma"),
    "youtu",
]
GROUPS = ragged()
FOREST = plant(GROUPS, 4)


def build(family: str) -> Any:
    if family not in CONFIG_MAPPING:
        pytest.skip("not in this version of transformers")
    torch.manual_seed(0)
    sizes = SIZES | DIFFERS.get(family, {})
    config = CONFIG_MAPPING[family](**{k: v for k, v in sizes.items() if v is not None})
    grouped = hasattr(config, "_experts_implementation")  # grouped kernels lack float64
    model = AutoModelForCausalLM.from_config(config, **({"experts_implementation": "eager"} if grouped else {}))
    for p in model.double().parameters():
        torch.nn.init.normal_(p, std=0.3 if p.dim() == 1 else 0.15)
    return model.train()


@pytest.mark.slow
@pytest.mark.parametrize("family", EXACT)
def test_exact_in_float64(family: str):
    model = build(family)
    assert problem(model, 128) is None
    if getattr(model.config, "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")
    with Float64():
        logp_T = plain(model, GROUPS)
        grads = gradients(model, logp_T)
        install(model)
        share(model)
        found_T = score(model, FOREST).logp_T
        assert furthest([found_T], [logp_T]) < 1e-12
        biggest = max(float(g.abs().max()) for g in grads)
        assert furthest(gradients(model, found_T), grads) < 1e-12 * max(1, biggest)
    assert verify(model.eval(), FOREST) < 1e-5
