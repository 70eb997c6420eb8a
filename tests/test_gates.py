"""Modules of heads under the policy: exact inside every wrapper, trained, saved apart, in nobody else's files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from forked import Job
from test_logprob import FOREST, backward, one_rank
from test_logprob_further import adapter_off, logits_of, made, shared
from tiny_models import V, furthest, tiny
from torch import Tensor, nn

from po.errors import UserError
from po.gates import FILE, Gates, attach, gates_of, load_gates, save_gates, sizes
from po.logprob import Want, install, score
from po.policy import add_adapter
from po.spec import LoraSpec, ModelSpec, Term
from po.types import Head, HeadInput, HeadOutput, Needs


class Pool(nn.Module):
    """A weight per layer and feature."""

    def __init__(self, hidden_size: int, layers: int) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_size, 1)
        self.layer_L = nn.Parameter(torch.linspace(0.5, 1, layers))

    def forward(self, hidden_TLD: Tensor) -> dict[str, Tensor]:
        gate_T = (self.dense(hidden_TLD)[..., 0] * self.layer_L).sum(-1)
        return {"gate": gate_T, "other": gate_T.tanh()}


@dataclass(frozen=True)
class ReadsPolicy(Head):
    needs: ClassVar[Needs] = Needs(layout="pair", hidden="policy")

    def __call__(self, x: HeadInput) -> HeadOutput:
        return HeadOutput(x.seg.sum(x.gate_T("gate")).sum(-1))

    def build(self, hidden_size: int, layers: int) -> nn.Module:
        return Pool(hidden_size, layers)


@dataclass(frozen=True)
class ReadsRef(Head):
    needs: ClassVar[Needs] = Needs(layout="pair", token_kl=True, hidden="ref")

    def __call__(self, x: HeadInput) -> HeadOutput:
        return HeadOutput(x.seg.sum(x.gate_T("gate") * x.token_kl_T).sum(-1))

    def build(self, hidden_size: int, layers: int) -> nn.Module:
        return Pool(hidden_size, layers)


@dataclass(frozen=True)
class ReadsNothing(Head):
    needs: ClassVar[Needs] = Needs(layout="pair")

    def __call__(self, x: HeadInput) -> HeadOutput:
        return HeadOutput(x.seg.sum(x.policy_T).sum(-1))


class Means(nn.Module):
    def forward(self, hidden_TLD: Tensor) -> dict[str, Tensor]:
        return {"mean": hidden_TLD.mean((1, 2))}


BOTH = (Term(ReadsNothing()), Term(ReadsPolicy()), Term(ReadsRef()))
LORA = LoraSpec(r=4, alpha=8, target_modules="all-linear")


def adapted(family: str = "llama", **extra):
    """As load_policy does it: PEFT first, then the gates."""
    model = tiny(family, **extra)
    install(model)
    policy = add_adapter(model, ModelSpec("tiny"), LORA)
    for name, p in policy.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    return policy.double()


def alone(module: nn.Module, hidden_TLD: Tensor, g: tuple[Tensor, ...]) -> tuple[dict[str, Tensor], list[Tensor]]:
    made = module(hidden_TLD)
    loss = (g[0] * made["gate"]).sum() + (g[1] * made["other"]).sum()
    return made, list(torch.autograd.grad(loss, module.parameters()))


def test_they_see_the_hidden_states_of_policy_and_reference():
    model = made("llama", "trained")
    hidden_TLD = logits_of(model, "llama")[1].detach()
    other_TLD = torch.randn(hidden_TLD.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gates = attach(model, BOTH)
    assert isinstance(gates, Gates)
    assert gates is gates_of(model)
    assert (gates.reads_policy, gates.reads_ref) == (True, True)
    found = score(shared(model), FOREST, Want(gates=True, ref_hidden_TLD=other_TLD)).gates
    assert found.keys() == {"1.gate", "1.other", "2.gate", "2.other"}
    g = tuple(torch.randn(len(FOREST.target_T), dtype=torch.float64) for _ in range(2))
    for i, modules, seen_TLD in (("1", gates.policy, hidden_TLD), ("2", gates.ref, other_TLD)):
        expected, grads = alone(modules[i], seen_TLD, g)
        assert furthest([found[f"{i}.gate"], found[f"{i}.other"]], [expected["gate"], expected["other"]]) < 1e-6
        model.zero_grad()
        ((g[0] * found[f"{i}.gate"]).sum() + (g[1] * found[f"{i}.other"]).sum()).backward()
        assert furthest([p.grad for p in modules[i].parameters()], grads) < 1e-6 * max(1, float(grads[0].abs().max()))
        assert all(p.grad is None for n, p in model.named_parameters() if "po_gates" not in n)  # nor trains the policy


def test_only_what_is_read_is_computed():
    model = shared(made("llama", "frozen"))
    attach(model, (Term(ReadsRef()),))
    want = Want(gates=True, ref_hidden_TLD=torch.zeros(len(FOREST.target_T), 3, 48, dtype=torch.float64))
    model.model.layers[0].register_forward_hook(lambda m, args, out: seen.append(len(m._forward_hooks)))
    seen: list[int] = []
    assert score(model, FOREST, want).gates.keys() == {"0.gate", "0.other"}
    assert score(model, FOREST, Want(hidden=True)).gates is None
    assert seen == [1, 2]


def test_no_head_no_gates():
    model = made("llama", "trained")
    assert attach(model, (Term(ReadsNothing()),)) is None
    assert gates_of(model) is None
    save_gates(model, Path("/nowhere"))
    load_gates(model, Path("/nowhere"))


def test_the_reference_may_have_other_sizes():
    model, other = made("llama", "trained"), tiny("llama", hidden_size=32, num_hidden_layers=3)
    assert sizes(other) == (32, 4)
    gates = attach(model, BOTH, other)
    assert gates.policy["1"].dense.in_features == 48
    assert gates.ref["2"].dense.in_features == 32
    assert gates.ref["2"].layer_L.shape == (4,)


def test_dtypes_are_their_own():
    """fp32 beside a 16-bit base, also under autocast."""
    model = shared(made("llama", "frozen").to(torch.bfloat16))
    gates = attach(model, (Term(ReadsPolicy()),))
    assert {p.dtype for p in gates.parameters()} == {torch.float32}
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = score(model, FOREST, Want(gates=True, hidden=True))
        expected = gates.policy["0"](found.hidden_TLD.float())
        assert found.gates["0.gate"].dtype == torch.float32
        assert torch.equal(found.gates["0.gate"], expected["gate"])


def test_a_module_without_parameters():
    gates = Gates({0: Means()}, {})
    hidden_TLD = torch.randn(4, 3, 2, dtype=torch.bfloat16)
    assert torch.equal(gates(hidden_TLD, None)["0.mean"], hidden_TLD.mean((1, 2)).float())


# PEFT


def test_no_adapter_touches_them():
    policy = adapted()
    attach(policy, BOTH)
    trained = {n for n, p in policy.named_parameters() if p.requires_grad}
    own = {n for n, _ in policy.named_parameters() if "po_gates" in n}
    assert len(own) == 6
    assert own < trained
    assert not any("lora" in n for n in own)
    assert all("lora_" in n for n in trained - own)
    shared(policy)
    off = adapter_off(policy)
    scores = score(policy, FOREST, Want(kl_against=off, gates=True, ref_hidden_TLD=ref_hidden(policy)))
    assert {n for n, p in policy.named_parameters() if p.requires_grad} == trained
    (scores.gates["2.gate"] * scores.token_kl_T + scores.gates["1.gate"]).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for n, p in policy.named_parameters() if n in trained)


@torch.no_grad()
def ref_hidden(policy) -> Tensor:
    with policy.disable_adapter():
        return score(policy, FOREST, Want(hidden=True)).hidden_TLD


# Files


def test_an_adapters_files_do_not_hold_them(tmp_path: Path):
    from safetensors.torch import load_file

    policy = adapted()
    policy.save_pretrained(tmp_path / "before")
    attach(policy, BOTH)
    policy.save_pretrained(tmp_path / "after")
    before, after = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("before", "after"))
    assert before.keys() == after.keys()


@pytest.mark.parametrize("tied", [False, True])
def test_a_models_files_do_not_hold_them(tmp_path: Path, tied: bool):
    from transformers import AutoModelForCausalLM

    model = tiny("llama", tie_word_embeddings=tied)
    install(model)
    attach(model, BOTH)
    model.save_pretrained(tmp_path, state_dict=model.state_dict())
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert not any("po_gates" in n for n, _ in loaded.named_parameters())


def test_saved_and_read_back(tmp_path: Path):
    policy = adapted()
    gates = attach(policy, BOTH)
    before = {n: p.detach().clone() for n, p in gates.named_parameters()}
    save_gates(policy, tmp_path, write=False)
    assert not (tmp_path / FILE).exists()
    save_gates(policy, tmp_path)
    with torch.no_grad():
        for p in gates.parameters():
            p.add_(1)
    load_gates(policy, tmp_path)
    assert all(torch.equal(p, before[n]) for n, p in gates.named_parameters())


def test_a_file_that_is_missing_or_of_other_heads(tmp_path: Path):
    policy = adapted()
    attach(policy, BOTH)
    with pytest.raises(UserError, match=rf"^{tmp_path / FILE} is missing: a checkpoint of this recipe holds the "):
        load_gates(policy, tmp_path)
    save_gates(policy, tmp_path)
    other = adapted()
    attach(other, BOTH[1:])
    with pytest.raises(UserError, match=r"gates.safetensors: 'policy\.0\.dense\.bias' does not fit; other heads or "):
        load_gates(other, tmp_path)
    smaller = adapted(num_hidden_layers=3)
    attach(smaller, BOTH)
    with pytest.raises(UserError, match=r"gates.safetensors: 'policy\.1\.layer_L' does not fit; other heads or "):
        load_gates(smaller, tmp_path)


# Wrappers


def run(called, policy) -> Tensor:
    """A loss through log-probs, KL and both gates; `called` is what a trainer would call."""
    off = adapter_off_of(called, policy)
    scores = score(called, FOREST, Want(kl_against=off, gates=True, ref_hidden_TLD=ref_hidden_of(called, policy)))
    g = scores.gates
    return scores.logp_T + g["1.gate"] * scores.logp_T + g["2.gate"] * scores.token_kl_T + g["2.other"]


@torch.no_grad()
def ref_hidden_of(called, policy) -> Tensor:
    with policy.disable_adapter():
        return score(called, FOREST, Want(hidden=True)).hidden_TLD


@torch.no_grad()
def adapter_off_of(called, policy):
    from po.logprob import against

    with policy.disable_adapter():
        return against(score(called, FOREST, Want(final=True)).final_TD, None)


def test_ddp(tmp_path: Path):
    policy = adapted()
    attach(policy, BOTH)
    shared(policy)
    grads = backward(policy, run(policy, policy))
    with one_rank(tmp_path):
        wrapped = nn.parallel.DistributedDataParallel(policy)
        assert furthest(backward(policy, run(wrapped, policy)), grads) < 1e-11
        assert gates_of(wrapped) is gates_of(policy)


def zero(stage: int, lora: bool, out: Path) -> None:
    import deepspeed
    from deepspeed.utils import safe_get_full_grad
    from safetensors.torch import load_file

    from po.hardening import keep_shm_clean

    keep_shm_clean()
    deepspeed.init_distributed("gloo")
    policy = adapted() if lora else made("llama", "trained")
    gates = attach(policy, BOTH if lora else BOTH[:2])
    shared(policy).float()
    reference = run if lora else run_all
    weight_T = torch.linspace(-1, 1, FOREST.target_T.numel())
    (weight_T * reference(policy, policy)).sum().backward()
    plain = {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()
    before = {n: p.detach().clone() for n, p in gates.named_parameters()}
    config = {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}
    config |= {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True}
    trained = [p for p in policy.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(model=policy, optimizer=torch.optim.SGD(trained, lr=0.0), config=config)
    for _ in range(2):  # ZeRO-3 prefetches from its second step on
        engine.backward((weight_T * reference(engine, policy)).sum())
        for name, p in policy.named_parameters():
            if name in plain:
                found = safe_get_full_grad(p)
                assert (found - plain[name]).abs().max() < 1e-4 * max(1, plain[name].abs().max()), name
        engine.step()
    assert gates_of(engine) is gates
    save_gates(engine, out, write=torch.distributed.get_rank() == 0)
    torch.distributed.barrier()
    stored = load_file(out / FILE)
    assert all(torch.equal(stored[n], v) for n, v in before.items())
    load_gates(engine, out)


def run_all(called, policy) -> Tensor:
    """All weights are trained: the KL to another model, candidates, and a gate on the policy."""
    reference = made("llama", "frozen", seed=7).float()
    from po.logprob import against

    with torch.no_grad():
        target = against(score(shared(reference), FOREST, Want(final=True)).final_TD, reference)
    ids_TM = FOREST.target_T[:, None] + torch.arange(3) - 3
    scores = score(called, FOREST, Want(kl_against=target, candidate_TM=ids_TM.clamp(max=V - 1), gates=True))
    return scores.logp_T + scores.gates["1.gate"] + scores.token_kl_T + scores.candidate_TM.sum(-1)


@pytest.mark.parametrize(
    ("stage", "lora"),
    [
        (3, True),
        pytest.param(3, False, marks=pytest.mark.slow),
        pytest.param(2, True, marks=pytest.mark.slow),
        pytest.param(2, False, marks=pytest.mark.slow),
    ],
)
def test_deepspeed(tmp_path: Path, stage: int, lora: bool):
    """Two ranks: gradients of adapter or all weights, and of gates, are those of plain torch; gates are saved whole."""
    job = Job(tmp_path / "log", zero, stage, lora, tmp_path, world=2)
    assert job.wait() == [0, 0], job.said
