"""The modules that token-level heads build: SparsePO's learned masks and MaPO's activations, by plain arithmetic."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from heads_support import F64, change, random_input
from torch.testing import assert_close

from po.heads.mapo import MaPO
from po.heads.sparsepo import Mask, SparsePO


def relu(x: float) -> float:
    return max(x, 0.0)


def dot(x: list[float], y: list[float]) -> float:
    return sum(a * b for a, b in zip(x, y, strict=True))


def mask_by_hand(net: Mask, hidden: list[list[float]]) -> float:
    """One token's mask from its hidden states by layer, without torch; epsilon 1e-5."""
    w, c = net.weight.tolist(), net.bias.tolist()
    if net.last:
        return relu(dot(w[0], hidden[-1]) + c[0])
    scale, shift, z = net.norm.weight.tolist(), net.norm.bias.tolist(), []
    for layer, h in enumerate(hidden[1:]):
        centre, spread = statistics.fmean(h), statistics.pvariance(h)
        normed = [(v - centre) / math.sqrt(spread + 1e-5) * s + b for v, s, b in zip(h, scale, shift, strict=True)]
        z.append(relu(dot(w[layer], normed) + c[layer]))
    return relu(dot(net.mix.tolist(), z))


@pytest.mark.parametrize("kind", ["simple_all", "simple_last"])
@pytest.mark.parametrize("common", [True, False])
def test_mask_networks(kind: str, common: bool) -> None:
    torch.manual_seed(0)
    module = SparsePO(mask=kind, common=common).build(6, 4).double()  # type: ignore[arg-type]
    for p in module.parameters():
        torch.nn.init.normal_(p)
    for net in module.masks:
        if kind == "simple_all":
            net.mix.data = torch.tensor([1.0, -0.7, 0.4], dtype=F64)  # some tokens on, some off
    hidden_TLD = torch.randn(40, 4, 6, dtype=F64)
    gates = module(hidden_TLD)
    nets = list(module.masks)
    assert len(nets) == (1 if common else 2)
    assert (gates["mask_u"] is gates["mask_d"]) == common
    for name, net in (("mask_u", nets[0]), ("mask_d", nets[-1])):
        want_T = [mask_by_hand(net, h) for h in hidden_TLD.tolist()]
        assert_close(gates[name], torch.tensor(want_T, dtype=F64))
        assert min(want_T) == 0 < max(want_T)
    for name, gate in gates.items():
        grads = torch.autograd.grad(gate.sum(), nets[0 if name == "mask_u" else -1].parameters(), retain_graph=True)
        assert all(g.abs().max() > 0 for g in grads)


def test_masks_start_as_the_authors_do_and_follow_the_seed() -> None:
    """Normal weights of deviation 0.02, no bias, a plain LayerNorm; the mixing weights positive, so that masks live."""
    made = []
    for _ in range(2):
        torch.manual_seed(1)
        made.append(SparsePO().build(256, 101).masks[0])
    net = made[0]
    assert all(torch.equal(a, b) for a, b in zip(made[0].parameters(), made[1].parameters(), strict=True))
    assert net.weight.shape == (100, 256)
    assert net.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert abs(net.weight.mean().item()) < 4e-4
    assert net.mix.shape == (100,)
    assert net.mix.square().mean().sqrt().item() == pytest.approx(0.02, rel=0.2)
    assert (net.mix > 0).all()
    assert net.bias.abs().max() == 0
    assert (net.norm.weight == 1).all()
    assert (net.norm.bias == 0).all()
    assert (net(torch.randn(64, 101, 256)) > 0).all()


def test_activations_of_a_16_bit_reference_are_averaged_in_fp32() -> None:
    hidden_TLD = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    gates = MaPO().build(6, 4)(hidden_TLD)
    assert_close(torch.stack(list(gates.values()), 1), hidden_TLD.float().mean(-1), rtol=1e-6, atol=1e-7)


def test_mapo_masks_are_standardised_and_rescaled_activations() -> None:
    """In the authors' order, with the standardisation that the rescaling cancels; the second response is one token."""
    hidden_TLD = torch.randn(6, 3, 5, generator=torch.Generator().manual_seed(2), dtype=F64)
    head = MaPO(beta=0.8)
    gates = head.build(5, 3)(hidden_TLD)
    assert list(gates) == ["layer_0", "layer_1", "layer_2"]
    assert list(head.build(5, 3).parameters()) == []
    x = change(random_input(head, [[5, 1]]), gates=gates)
    by_layer = []
    for layer in range(3):
        a = [statistics.fmean(h) for h in hidden_TLD[:5, layer].tolist()]
        z = [(v - statistics.fmean(a)) / (statistics.stdev(a) + 1e-12) for v in a]
        by_layer.append([(v - min(z)) / (max(z) - min(z)) for v in z])
    want_T = [statistics.fmean(column) for column in zip(*by_layer, strict=True)] + [1.0]
    assert_close(head(x).metrics["mapo/mask"], torch.tensor(want_T, dtype=F64))


def test_equal_activations_weigh_one() -> None:
    x = random_input(MaPO(), [[3, 2]])
    flat = {k: torch.full_like(t, 0.1) for k, t in x.gates.items()}
    assert MaPO()(change(x, gates=flat)).metrics["mapo/mask"].tolist() == [1.0] * 5
