"""Which models share prompts: refused by their config, or by their numbers on the first batch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_logprob import one_rank
from tiny_models import FAMILIES, V, ragged, tiny
from torch import nn

from po.attention import forest_attention
from po.errors import NumericsError, UserError
from po.forest import pad, plant
from po.logprob import install
from po.sharing import problem, share, verify

GROUPS = ragged()
FOREST, PADDED = plant(GROUPS, 4), pad(GROUPS, 4)
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": V}
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}


def build(name: str, **config: Any) -> Any:
    torch.manual_seed(0)
    made = getattr(transformers, f"{name}Config")(**config)
    experts = {"experts_implementation": "eager"} if "num_experts" in config else {}
    model = transformers.AutoModelForCausalLM.from_config(made, **experts).double().eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3 if p.dim() == 1 else 0.15)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_sound_models_pass(family: str):
    model = tiny(family).eval()
    install(model)
    assert problem(model, 128) is None
    share(model)
    for stream in (FOREST, PADDED):
        assert verify(model, stream) < 1e-6


@pytest.mark.parametrize(
    ("name", "config", "reason"),
    [
        (
            "Mamba",
            {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": V, "state_size": 4},
            "it has recurrent layers, whose state runs on from one response into the next",
        ),
        (
            "Lfm2",
            {**SIZES, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]},
            "it has layers of type conv, which po's attention does not compute",
        ),
        (
            "Bloom",
            {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": V},
            "its code does not take its attention from transformers' AttentionInterface",
        ),
        (
            "Nemotron",
            {**SIZES, "num_key_value_heads": 2},
            "its layers do not hand keyword arguments down to their attention",
        ),
    ],
)
def test_known_problems(name: str, config: dict[str, Any], reason: str):
    """And unshared, one padded row per response, such a model is scored right."""
    model = build(name, **config)
    assert problem(model) == reason
    install(model)
    assert verify(model, PADDED) < 1e-5
    text = (
        f"model.share_prefix: {type(model).__name__} cannot share a prompt between responses: {reason}. Set it to auto "
        "or false (each response then carries its own copy of the prompt)"
    )
    with pytest.raises(UserError, match="^" + re.escape(text) + "$"):
        share(model)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Llama4Text", "it has layers of type chunked_attention, which po's attention does not compute"),
        ("GptOss", "it has attention sinks, which po's attention does not compute"),
    ],
)
def test_attention_that_po_does_not_compute(name: str, reason: str):
    assert problem(build(name, **SIZES, **MOE, num_key_value_heads=2, head_dim=8, pad_token_id=0)) == reason


def test_a_rotary_embedding_that_grows_limits_the_length():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = build("Llama", **SIZES, max_position_embeddings=64, rope_parameters=rope)
    assert problem(model, 64) is None
    text = (
        "data.max_length: got 65, expected at most 64 for LlamaForCausalLM: beyond that its rotary embedding (dynamic) "
        "changes with the longest sequence of a batch, so that a response's log-prob would depend on its neighbours"
    )
    with pytest.raises(UserError, match="^" + re.escape(text) + "$"):
        problem(model, 65)


# The start-up check


def refused(model: Any, text: str, stream: Any = FOREST, tolerance: float | None = None) -> None:
    with pytest.raises(NumericsError, match="^" + text):
        verify(model, stream, tolerance)


def test_a_window_that_only_the_mask_knows_is_found():
    """phimoe does not tell its attention; found even where no sequence of the first batch exceeds the window."""
    model = build("Phimoe", **SIZES, **MOE, num_key_value_heads=2, sliding_window=1000, pad_token_id=0)
    install(model)
    model.set_attn_implementation("po_forest")
    refused(
        model,
        "start-up check of the packed stream: layer 0 has a sliding window in a plain forward, but its attention is "
        r"not told so. Set model.share_prefix: false \(each response then carries its own copy of the prompt\)$",
    )


class Deaf(nn.Module):
    """An attention layer that passes everything on but the forest, in the place of a real one."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, *args: Any, forest: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        return self.attention(*args, attention_mask=None, **kwargs)


def test_a_layer_that_does_not_hear_of_the_forest_is_found():
    model = tiny("llama").eval()
    install(model)
    share(model)
    layer = model.model.layers[1]
    layer.self_attn = Deaf(layer.self_attn)
    refused(model, "start-up check of the packed stream: it reached 1 of 2 layers. Set model.share_prefix: false")


def test_wrong_positions_are_found(monkeypatch: pytest.MonkeyPatch):
    """A model that makes its own positions from the stream's order."""
    model = tiny("llama").eval()
    install(model)
    share(model)
    own = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda *args, position_ids=None, **kwargs: own(*args, **kwargs))
    text = (
        "start-up check of the packed stream: log-probs differ from a plain forward of LlamaForCausalLM by up to "
        r"[\d.]+ per token; expected at most 1e-05 in torch.float64. Set model.share_prefix: false"
    )
    refused(model, text)


def test_a_head_that_does_more_than_its_weights_is_found():
    """ModernBERT's decoder transforms hidden states before its output embedding; neither stream can score it."""
    model = build("ModernBertDecoder", **SIZES, pad_token_id=0)
    install(model)
    refused(model, "start-up check of padded rows: log-probs differ .* po cannot score this model$", PADDED)
    share(model)
    refused(model, "start-up check of the packed stream: log-probs differ")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_low_precision_stays_within_its_tolerance(family: str, dtype: torch.dtype):
    model = tiny(family, dtype).eval()
    install(model)
    share(model)
    print(family, dtype, verify(model, FOREST))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.float16, 0.05), (torch.bfloat16, 0.5)])
def test_a_trained_model_stays_within_its_tolerance(dtype: torch.dtype, bound: float):
    folder = Path(__file__).parents[1].parent / "shared" / "models" / "stories260k"
    if not folder.exists():
        pytest.skip(f"no model at {folder}")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    install(model)
    share(model)
    gap = verify(model, plant(ragged(0, groups=8, prompt=60, response=60), 4))
    assert 0 < gap < bound, gap
    print(dtype, gap)


def test_the_tolerance_follows_autocast():
    model = tiny("llama", torch.float32).eval()
    install(model)
    share(model)
    refused(model, "start-up check", tolerance=0.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert verify(model, FOREST) > 1e-3  # what fp32 would not be allowed


def test_adapters_and_ddp_are_looked_through(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = tiny("qwen2").eval()
    install(model)
    share(model)
    wrapped = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")).eval()
    with one_rank(tmp_path):
        assert verify(nn.parallel.DistributedDataParallel(wrapped), FOREST) < 1e-6


def test_every_rank_runs_the_same_number_of_forwards():
    """ZeRO-3's forwards are collective: groups of different K must not make ranks differ."""
    counts = []
    model = tiny("llama").eval()
    install(model)
    share(model)
    model.model.register_forward_hook(lambda *_: counts.append(1))
    for groups in ([([1, 2], [[3]])], ragged(1, groups=7)):
        counts.clear()
        verify(model, plant(groups, 4))
        assert len(counts) == 5


def test_the_attention_is_registered_by_name():
    assert transformers.AttentionInterface()["po_forest"] is forest_attention
