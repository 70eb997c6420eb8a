"""The packed forest's log-probs and gradients equal one plain forward per response, for every family and wrapper."""

from __future__ import annotations

import contextlib
import re
import time

import pytest
import torch
from tiny_models import FAMILIES, REQUIRED, Float64, V, furthest, gradients, plain, ragged, tiny
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from po import head_chunks
from po.attention import using
from po.errors import NumericsError
from po.forest import pad, plant
from po.logprob import Want, install, score
from po.sharing import share

GROUPS = ragged(groups=3)
FOREST, PADDED = plant(GROUPS, 4), pad(GROUPS, 4)


def own_attention(family: str) -> str:
    """What transformers itself would use: soft-capped scores have no SDPA."""
    return "eager" if family == "gemma2" else "sdpa"


def oracle(model, family: str) -> tuple[Tensor, list[Tensor]]:
    """Log-probs and gradients of plain forwards in the model's own attention; then the model is made to share."""
    model.set_attn_implementation(own_attention(family))
    logp_T = plain(model, GROUPS)
    found = logp_T.detach(), gradients(model, logp_T)
    install(model)
    share(model)
    return found


def test_the_required_families_are_tried():
    assert set(REQUIRED) <= set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_in_float64(family: str):
    """Both CPU backends and the padded rows; ragged K; one-token prompts and responses; windows shorter than both."""
    model = tiny(family)
    with Float64():
        logp_T, grads = oracle(model, family)
        biggest = max(float(g.abs().max()) for g in grads)
        for stream, name in ((FOREST, "sliced"), (FOREST, "dense"), (PADDED, "sliced")):
            with using(name):
                found_T = score(model, stream).logp_T
                assert found_T.dtype == torch.float64
                assert furthest([found_T], [logp_T]) < 1e-12
                assert furthest(gradients(model, found_T), grads) < 1e-12 * max(1, biggest)


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere"])
def test_a_temperature_divides_the_logits(family: str):
    """Also behind a logit scale and soft-capping; log-probs, entropy and gradients."""
    model = tiny(family)
    with Float64():
        model.set_attn_implementation(own_attention(family))
        logp_T = plain(model, GROUPS, temperature=0.7)
        grads = gradients(model, logp_T)
        install(model)
        share(model)
        found = score(model, FOREST, Want(0.7, entropy=True))
        assert furthest([found.logp_T], [logp_T]) < 1e-12
        assert furthest(gradients(model, found.logp_T), grads) < 1e-12 * max(
            1, max(float(g.abs().max()) for g in grads)
        )
    assert (found.entropy_T < score(model, FOREST, Want(entropy=True)).entropy_T).all()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_flex_is_exact_in_float64(family: str):
    """Forward: torch's FlexAttention has no backward pass on CPU. Grouped queries, window, soft-capping."""
    model = tiny(family)
    install(model)
    share(model)
    with torch.no_grad(), using("flex"):
        found_T = score(model, FOREST).logp_T
    with torch.no_grad(), using("dense"):
        assert furthest([found_T], [score(model, FOREST).logp_T]) < 1e-12


@pytest.mark.parametrize("family", REQUIRED)
def test_as_transformers_computes_it(family: str):
    """Norms and softmaxes rounded to fp32, as shipped: what differs from the exact case is that rounding."""
    model = tiny(family)
    logp_T, grads = oracle(model, family)
    found_T = score(model, FOREST).logp_T
    assert furthest([found_T], [logp_T]) < 5e-6
    assert furthest(gradients(model, found_T), grads) < 5e-5


def test_fp32_and_bf16_are_close():
    exact_T, _ = oracle(tiny("llama"), "llama")
    for dtype, bound in ((torch.float32, 2e-5), (torch.bfloat16, 0.5)):
        model = tiny("llama", dtype)
        oracle(model, "llama")
        found_T = score(model, FOREST).logp_T
        assert found_T.dtype == torch.float32
        assert furthest([found_T.double()], [exact_T]) < bound


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_autocast_is_close(family: str):
    model = tiny(family, torch.float32)
    logp_T, _ = oracle(model, family)
    with torch.autocast("cpu", torch.bfloat16):
        found_T = score(model, FOREST).logp_T
    gradients(model, found_T)
    assert found_T.dtype == torch.float32
    assert 1e-5 < furthest([found_T], [logp_T]) < 0.5


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "cohere", "phi"])
@pytest.mark.parametrize("frozen_head", [False, True])
def test_entropy_and_correct(family: str, frozen_head: bool):
    model = tiny(family)
    with torch.no_grad(), Float64():
        model.set_attn_implementation(own_attention(family))
        rows = []
        for prompt, responses in GROUPS:
            for r in responses:
                logits = model(input_ids=torch.tensor([[*prompt, *r]])).logits[0, len(prompt) - 1 : -1]
                rows.append(logits.log_softmax(-1))
    log_prob_TV = torch.cat(rows)
    model.get_output_embeddings().requires_grad_(not frozen_head)
    install(model)
    share(model)
    with Float64():
        scores = score(model, FOREST, entropy=True)
    assert furthest([scores.entropy_T], [-(log_prob_TV.exp() * log_prob_TV).sum(-1)]) < 1e-12
    assert torch.equal(scores.correct_T, log_prob_TV.argmax(-1) == FOREST.target_T)
    assert not scores.entropy_T.requires_grad
    assert scores.logp_T.requires_grad
    assert score(model, FOREST).entropy_T.eq(0).all()


def backward(model, logp_T: Tensor) -> list[Tensor]:
    """As `gradients`, through .backward() and the hooks that only that fires."""
    model.zero_grad()
    weight_T = torch.linspace(-1, 1, logp_T.numel(), dtype=logp_T.dtype)
    (weight_T * logp_T).sum().backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(family: str, reentrant: bool):
    model = tiny(family)
    install(model)
    share(model)
    logp_T = score(model, FOREST).logp_T
    grads = backward(model, logp_T)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    found_T = score(model, FOREST).logp_T
    assert torch.equal(found_T, logp_T)
    assert furthest(backward(model, found_T), grads) < 1e-12


# Memory


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.numel())
        return out


def lora(model, **config):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(2)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **config)).double()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    return model


@pytest.mark.parametrize("head", ["trained", "frozen", "lora"])
def test_no_positions_by_vocabulary_tensor_exists(head: str, monkeypatch: pytest.MonkeyPatch):
    vocab, rows = 4000, 16
    monkeypatch.setattr(head_chunks, "_CHUNK", {"cpu": rows * vocab, "cuda": 0})
    model = tiny("llama", vocab_size=vocab, hidden_size=16, head_dim=8)
    install(model)
    share(model)
    if head == "lora":
        model = lora(model, target_modules=["q_proj", "lm_head"])
    else:
        model.get_output_embeddings().requires_grad_(head == "trained")
    stream = plant(ragged(groups=12, response=40), 4)
    tokens = stream.target_T.numel()
    with Largest() as largest:
        score(model, stream, entropy=True).logp_T.sum().backward()
    assert tokens > 20 * rows
    assert rows * vocab <= largest.numel <= 2 * rows * vocab < tokens * vocab / 10


@pytest.mark.parametrize("head", ["trained", "frozen", "lora"])
def test_chunks_change_nothing(head: str, monkeypatch: pytest.MonkeyPatch):
    """16 rows at a time equal all at once, also with soft-capping."""
    found = []
    for rows in (16, 1 << 12):
        monkeypatch.setattr(head_chunks, "_CHUNK", {"cpu": rows * V, "cuda": 0})
        model = tiny("gemma2")
        install(model)
        share(model)
        if head == "lora":
            model = lora(model, target_modules=["q_proj", "lm_head"])
        else:
            model.get_output_embeddings().requires_grad_(head == "trained")
        logp_T = score(model, FOREST).logp_T
        found.append([logp_T, *gradients(model, logp_T)])
    assert furthest(*found) < 1e-11


# Wrappers


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": "all-linear"},
        {"target_modules": "all-linear", "use_dora": True},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["linear", "dora", "head", "saved-head"],
)
def test_peft(config):
    model = tiny("llama")
    install(model)
    share(model)
    with Float64():
        base_T = score(model, FOREST).logp_T.detach()
        wrapped = lora(model, **config)
        expected_T = plain(wrapped, GROUPS)
        found_T = score(wrapped, FOREST).logp_T
        assert furthest([found_T], [expected_T]) < 1e-12
        assert furthest(gradients(wrapped, found_T), gradients(wrapped, expected_T)) < 1e-12 * 100
        assert furthest([found_T], [base_T]) > 1e-2
        with wrapped.disable_adapter(), torch.no_grad():
            assert furthest([score(wrapped, FOREST).logp_T], [base_T]) < 1e-12


@contextlib.contextmanager
def one_rank(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        time.sleep(0.2)  # gloo's threads drop their last work; they need the interpreter's lock, which the end holds
        torch.distributed.destroy_process_group()


def test_ddp(tmp_path):
    model = tiny("llama")
    with one_rank(tmp_path), Float64():
        logp_T, grads = oracle(model, "llama")
        wrapped = nn.parallel.DistributedDataParallel(model)
        found_T = score(wrapped, FOREST).logp_T
        assert furthest([found_T], [logp_T]) < 1e-12
        assert furthest(backward(model, found_T), grads) < 1e-11


def test_a_copy_scores_with_its_own_weights():
    """deepcopy, as for a frozen reference, must not stay bound to the model it came from."""
    import copy

    model = tiny("llama")
    install(model)
    share(model)
    before_T = score(model, FOREST).logp_T.detach()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    assert torch.equal(score(twin, FOREST).logp_T, before_T)
    assert furthest([score(model, FOREST).logp_T], [before_T]) > 0.1


def test_a_recurrent_model_scores_padded_rows():
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=V, state_size=4)).double()
    logp_T = plain(model, GROUPS)
    grads = gradients(model, logp_T)
    install(model)
    found_T = score(model, PADDED).logp_T
    assert furthest([found_T], [logp_T]) < 1e-6
    assert furthest(gradients(model, found_T), grads) < 1e-5


def test_a_model_that_drops_the_forest_is_not_scored():
    """transformers' Nemotron does not hand keyword arguments down to its attention."""
    from transformers import NemotronConfig, NemotronForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = NemotronForCausalLM(NemotronConfig(**sizes, vocab_size=V, num_key_value_heads=2))
    install(model)
    model.set_attn_implementation("po_forest")
    text = "NemotronAttention: the packed stream did not reach the attention layers, because the model's code does not "
    with pytest.raises(NumericsError, match="^" + re.escape(text)):
        score(model, FOREST)
    model.set_attn_implementation("sdpa")
    assert torch.isfinite(score(model, PADDED).logp_T).all()


def test_install_refuses_what_has_no_head():
    from transformers import LlamaModel

    model = LlamaModel(tiny("llama").config)
    with pytest.raises(
        ValueError, match=r"^LlamaModel has no backbone and LM head that can be called one after the other$"
    ):
        install(model)


def test_a_plain_call_is_untouched():
    model = tiny("llama").eval()
    ids = torch.tensor([GROUPS[2][0]])
    before = model(input_ids=ids).logits
    install(model)
    install(model)
    assert torch.equal(model(input_ids=ids).logits, before)
