"""What `score` gives besides log-probs equals plain torch on the logits of one plain forward per response."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch
from test_logprob import FOREST, GROUPS, PADDED, Largest, backward, lora, one_rank, own_attention
from tiny_models import Float64, V, furthest, plain, ragged, tiny
from torch import Tensor, nn

from po import head_chunks
from po.errors import UserError
from po.forest import plant
from po.logprob import Want, against, install, score
from po.sharing import share

T = FOREST.target_T.numel()
M = 5
HEADS = {
    "trained": None,
    "frozen": None,
    "lora": {"target_modules": ["q_proj", "lm_head"]},
    "dora": {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


def ids_TM() -> Tensor:
    """Token ids, some twice in a row, some missing, one row without any."""
    ids = torch.randint(0, V, (T, M), generator=torch.Generator().manual_seed(3))
    ids[:, 1] = FOREST.target_T
    ids[2, 4] = ids[2, 0]
    ids[3, 2:] = -1
    ids[5] = -1
    return ids


def logits_of(model, family: str) -> tuple[Tensor, Tensor]:
    """The logits that predict each response token (T, V), and the hidden states there (T, L, D), by plain forwards."""
    logits, hidden = [], []
    for prompt, responses in GROUPS:
        for r in responses:
            out = model(input_ids=torch.tensor([[*prompt, *r]]), use_cache=False, output_hidden_states=True)
            at = slice(len(prompt) - 1, -1)
            logits.append(out.logits[0, at])
            hidden.append(torch.stack(out.hidden_states, 2)[0, at])
    return torch.cat(logits), torch.cat(hidden)


def made(family: str, head: str, seed: int = 0):
    """A policy whose head is trained, frozen, or adapted; not yet sharing."""
    model = tiny(family)
    if seed:
        torch.manual_seed(seed)
        for p in model.parameters():
            nn.init.normal_(p, std=0.3 if p.dim() == 1 else 0.15)
    model.set_attn_implementation(own_attention(family))
    install(model)
    if HEADS[head]:
        return lora(model, **HEADS[head])
    model.get_output_embeddings().requires_grad_(head == "trained")
    if head == "frozen":
        model.get_input_embeddings().requires_grad_(False)  # tied, or another than the head's
    return model


def shared(model):
    share(model.get_base_model() if hasattr(model, "get_base_model") else model)
    return model


@torch.no_grad()
def adapter_off(model, stream=FOREST):
    with model.disable_adapter():
        return against(score(model, stream, Want(final=True)).final_TD, None)


def weights() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(4)
    return tuple(torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((T,), (T, M), (T,)))  # type: ignore[return-value]


def pulled(model, logp_T: Tensor, candidate_TM: Tensor, kl_T: Tensor) -> list[Tensor]:
    """Gradients of a weighted sum of all that carries gradient."""
    a_T, b_TM, c_T = weights()
    loss = (a_T * logp_T).sum() + (b_TM * candidate_TM).sum() + (c_T * kl_T).sum()
    params = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, params, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(params, found)]


def expected(logits_TV: Tensor, ref_TV: Tensor):
    """log pi, candidates, KL, collision and entropy in plain torch."""
    log_TV, ref_TV, ids = logits_TV.log_softmax(-1), ref_TV.log_softmax(-1).detach(), ids_TM()
    candidate = torch.where(ids < 0, 0, log_TV.gather(-1, ids.clamp(min=0)))
    kl = (ref_TV.exp() * (ref_TV - log_TV)).sum(-1)
    flat = log_TV.detach()
    logp = log_TV.gather(-1, FOREST.target_T[:, None])[:, 0]
    return logp, candidate, kl, flat.exp().square().sum(-1).log(), -(flat.exp() * flat).sum(-1)


def compare(model, scores, logits_TV: Tensor, ref_TV: Tensor) -> None:
    logp, candidate, kl, collision, entropy = expected(logits_TV, ref_TV)
    values = (scores.logp_T, scores.candidate_TM, scores.token_kl_T, scores.collision_T, scores.entropy_T)
    assert furthest(values, (logp, candidate, kl, collision, entropy)) < 1e-12
    assert all(x.dtype == torch.float64 for x in values)
    assert [x.requires_grad for x in values] == [True, True, True, False, False]
    grads = pulled(model, logp, candidate, kl)
    biggest = max(float(g.abs().max()) for g in grads)
    found = pulled(model, scores.logp_T, scores.candidate_TM, scores.token_kl_T)
    assert biggest > 1
    assert furthest(found, grads) < 1e-12 * biggest


def everything(target) -> Want:
    return Want(entropy=True, collision=True, candidate_TM=ids_TM(), kl_against=target)


@pytest.mark.parametrize("rows", [16, 1 << 12])
@pytest.mark.parametrize("head", ["trained", "frozen"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi", "cohere", "granite"])
def test_exact_against_a_frozen_reference(family: str, head: str, rows: int, monkeypatch: pytest.MonkeyPatch):
    """Soft-capping, bias, both kinds of scale; chunks of 16 rows and all at once."""
    monkeypatch.setattr(head_chunks, "_CHUNK", {"cpu": rows * V, "cuda": 0})
    model, reference = made(family, head), made(family, "frozen", seed=7)
    with Float64():
        logits_TV, _ = logits_of(model, family)
        with torch.no_grad():
            ref_TV, _ = logits_of(reference, family)
            target = against(score(shared(reference), FOREST, Want(final=True)).final_TD, reference)
        compare(model, score(shared(model), FOREST, everything(target)), logits_TV, ref_TV)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("head", ["lora", "dora", "saved"])
def test_exact_against_the_policy_with_its_adapter_off(family: str, head: str, monkeypatch: pytest.MonkeyPatch):
    """The adapter is on the LM head, or replaces it: the reference's head is the one below."""
    monkeypatch.setattr(head_chunks, "_CHUNK", {"cpu": 16 * V, "cuda": 0})
    extra = {} if head == "saved" or family == "llama" else {"tie_word_embeddings": False}
    model = tiny(family, **extra)
    model.set_attn_implementation(own_attention(family))
    install(model)
    model = lora(model, **HEADS[head])
    if head == "saved":
        nn.init.normal_(model.get_output_embeddings().weight, std=0.2)
    with Float64():
        logits_TV, _ = logits_of(model, family)
        with torch.no_grad(), model.disable_adapter():
            ref_TV, _ = logits_of(model, family)
        shared(model)
        compare(model, score(model, FOREST, everything(adapter_off(model))), logits_TV, ref_TV)


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi", "cohere"])
def test_exact_with_the_adapter_elsewhere(family: str):
    model = lora(made(family, "frozen"), target_modules=["q_proj", "v_proj"])
    with Float64():
        logits_TV, _ = logits_of(model, family)
        with torch.no_grad(), model.disable_adapter():
            ref_TV, _ = logits_of(model, family)
        shared(model)
        compare(model, score(model, FOREST, everything(adapter_off(model))), logits_TV, ref_TV)


@pytest.mark.parametrize("head", ["trained", "frozen", "lora"])
def test_exact_against_a_reference_with_an_adapter_on_its_head(head: str):
    model, reference = made("llama", head), made("llama", "lora", seed=7).requires_grad_(False)
    with Float64():
        logits_TV, _ = logits_of(model, "llama")
        with torch.no_grad():
            ref_TV, _ = logits_of(reference, "llama")
            target = against(score(shared(reference), FOREST, Want(final=True)).final_TD, reference)
        compare(model, score(shared(model), FOREST, everything(target)), logits_TV, ref_TV)


@pytest.mark.parametrize("head", ["frozen", "lora"])
def test_nothing_is_lost_or_made_at_the_reference(head: str):
    """KL is 0, and pulls nowhere, where the policy is its reference."""
    model = shared(
        lora(made("llama", "frozen"), **(HEADS["lora"] if head == "lora" else {"target_modules": ["q_proj"]}))
    )
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.zeros_(p)
    scores = score(model, FOREST, Want(kl_against=adapter_off(model)))
    assert scores.token_kl_T.abs().max() < 1e-14
    grads = torch.autograd.grad(scores.token_kl_T.sum(), [p for p in model.parameters() if p.requires_grad])
    assert max(float(g.abs().max()) for g in grads) < 1e-13


@pytest.mark.parametrize("head", ["frozen", "lora"])
def test_missing_candidates_are_zero_and_pull_nothing(head: str):
    model = shared(made("llama", head))
    candidate_TM = score(model, FOREST, Want(candidate_TM=ids_TM())).candidate_TM
    missing_TM = ids_TM() < 0
    assert candidate_TM[missing_TM].eq(0).all()
    assert candidate_TM[~missing_TM].lt(0).all()
    params = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(candidate_TM[missing_TM].sum(), params, allow_unused=True)
    assert all(g is None or g.eq(0).all() for g in grads)


def test_what_was_not_asked_for_is_none():
    scores = score(shared(made("llama", "frozen")), FOREST)
    assert scores[3:] == (None,) * 6
    assert scores.entropy_T.eq(0).all()


def test_sizes_must_agree():
    model = shared(made("llama", "trained"))
    other = tiny("llama", vocab_size=V + 3)
    install(other)
    target = against(torch.zeros(T, 48, dtype=torch.float64), other)
    expected = rf"^reference\.from: its LM head has {V + 3} outputs and the policy's has {V}, so there is no KL between"
    with pytest.raises(UserError, match=expected):
        score(model, FOREST, Want(kl_against=target))
    wrapped = shared(made("llama", "lora"))
    with pytest.raises(UserError, match=expected):
        score(wrapped, FOREST, Want(kl_against=target))


# Hidden states


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("stream", [FOREST, PADDED], ids=["forest", "padded"])
def test_hidden_states_are_those_of_transformers(family: str, stream):
    """Of the embeddings and every layer, the last one normed; gradients where they are asked for."""
    model = made(family, "frozen")
    with Float64():
        _, hidden_TLD = logits_of(model, family)
        weight = torch.randn(hidden_TLD.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
        params = [p for p in model.parameters() if p.requires_grad]
        grads = torch.autograd.grad((weight * hidden_TLD).sum(), params)
        shared(model)
        scores = score(model, stream, Want(hidden=True, final=True))
        assert not scores.hidden_TLD.requires_grad
        assert not scores.final_TD.requires_grad
        assert furthest([scores.hidden_TLD], [hidden_TLD]) < 1e-12
        assert torch.equal(scores.final_TD, scores.hidden_TLD[:, -1])
        scores = score(model, stream, Want(hidden=True, hidden_gradient=True))
        assert furthest([scores.hidden_TLD], [hidden_TLD]) < 1e-12
        found = torch.autograd.grad((weight * scores.hidden_TLD).sum(), params)
    assert furthest(found, grads) < 1e-12 * max(1, *(float(g.abs().max()) for g in grads))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("gradient", [False, True])
def test_gradient_checkpointing_changes_no_hidden_state(reentrant: bool, gradient: bool):
    model = shared(made("llama", "trained"))
    model.enable_input_require_grads()
    want = Want(hidden=True, hidden_gradient=gradient)

    def run() -> tuple[Tensor, list[Tensor]]:
        scores = score(model, FOREST, want)
        total_T = scores.logp_T + (scores.hidden_TLD.square().sum((1, 2)) if gradient else 0)
        return scores.hidden_TLD.detach(), backward(model, total_T)

    hidden_TLD, grads = run()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found_TLD, found = run()
    assert torch.equal(found_TLD, hidden_TLD)
    assert furthest(found, grads) < 1e-12 * max(float(g.abs().max()) for g in grads)


def test_hidden_states_are_kept_at_response_positions_alone():
    """No operation returns the hidden states of all layers at all positions, and no hook stays behind."""
    model = shared(tiny("llama", num_hidden_layers=6, intermediate_size=48, vocab_size=V).eval())
    install(model)
    stream = plant([(range(3, 80), [range(3, 9)])], 1)
    with Largest() as largest, torch.no_grad():
        hidden_TLD = score(model, stream, Want(hidden=True)).hidden_TLD
    assert hidden_TLD.shape == (6, 7, 48)
    assert largest.numel < 7 * 48 * stream.input_S.numel() / 2
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.model.layers)


# Memory


@pytest.mark.parametrize("head", ["trained", "frozen", "lora"])
def test_no_positions_by_vocabulary_tensor_exists(head: str, monkeypatch: pytest.MonkeyPatch):
    vocab, rows = 4000, 16
    monkeypatch.setattr(head_chunks, "_CHUNK", {"cpu": rows * vocab, "cuda": 0})
    model = tiny("llama", vocab_size=vocab, hidden_size=16, head_dim=8)
    install(model)
    shared(model)
    if head == "lora":
        model = lora(model, **HEADS["lora"])
    else:
        model.get_output_embeddings().requires_grad_(head == "trained")
    stream = plant(ragged(groups=12, response=40), 4)
    tokens = stream.target_T.numel()
    with Largest() as largest:
        if head == "lora":
            target = adapter_off(model, stream)
        else:
            with torch.no_grad():
                target = against(score(model, stream, Want(final=True)).final_TD, None)
        ids = torch.randint(0, vocab, (tokens, M))
        scores = score(model, stream, replace(everything(target), candidate_TM=ids))
        (scores.logp_T + scores.candidate_TM.sum(-1) + scores.token_kl_T).sum().backward()
    assert tokens > 20 * rows
    assert rows * vocab <= largest.numel <= 2 * rows * vocab < tokens * vocab / 10


# Wrappers and dtypes


def test_ddp(tmp_path):
    model, reference = made("llama", "trained"), shared(made("llama", "frozen", seed=7))
    shared(model)
    with torch.no_grad():
        target = against(score(reference, FOREST, Want(final=True)).final_TD, reference)

    def run(called) -> list[Tensor]:
        scores = score(called, FOREST, everything(target))
        return backward(model, scores.logp_T + scores.candidate_TM.sum(-1) + scores.token_kl_T)

    grads = run(model)
    with one_rank(tmp_path):
        assert furthest(run(nn.parallel.DistributedDataParallel(model)), grads) < 1e-11


@pytest.mark.parametrize("head", ["trained", "frozen", "lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_low_precision_is_close(head: str, dtype: torch.dtype, autocast: bool):
    """Against the exact values: bf16 rounds hidden states and products, and the KL of small logits stays close."""
    model, reference = shared(made("llama", head)), shared(made("llama", "frozen", seed=7))
    with torch.no_grad():
        exact = against(score(reference, FOREST, Want(final=True)).final_TD, reference)
    truth = score(model, FOREST, everything(exact))
    model, reference = model.to(dtype), reference.to(dtype)
    with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
        with torch.no_grad():
            target = against(score(reference, FOREST, Want(final=True)).final_TD, reference)
        scores = score(model, FOREST, replace(everything(target), hidden=True))
    bound = 0.5 if autocast or dtype == torch.bfloat16 else 1e-4
    for name in ("candidate_TM", "token_kl_T", "collision_T", "entropy_T"):
        found, value = getattr(scores, name), getattr(truth, name)
        assert found.dtype == torch.float32
        assert furthest([found.double()], [value]) < bound, name
    assert scores.hidden_TLD.shape == (T, 3, 48)
    pulled(model, scores.logp_T, scores.candidate_TM, scores.token_kl_T)


def test_log_probs_do_not_depend_on_what_else_is_asked():
    """Bit for bit, so that looking at more does not train another model."""
    model = shared(made("llama", "frozen"))
    with torch.no_grad():
        target = against(score(model, FOREST, Want(final=True)).final_TD, None)
    before = score(model, FOREST)
    after = score(model, FOREST, replace(everything(target), hidden=True))
    assert torch.equal(before.logp_T, after.logp_T)
    assert torch.equal(before.correct_T, after.correct_T)
    assert furthest([before.logp_T], [plain(model, GROUPS)]) < 1e-5
