"""Samples are draws from the policy's softmax, their log-probs are those that training computes, and nothing of the
model or of the random state changes by sampling."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig

from po.errors import UserError
from po.forest import pad
from po.logprob import install, score
from po.rollout.choose import Choose, Chosen, drawn
from po.rollout.decode import copies
from po.rollout.hf import HFSampler
from po.rollout.sampler import Sampled, Sampling
from po.scores import Want
from po.sharing import problem, share

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
STOP = 2
FAMILIES = ("llama", "qwen2", "gpt2", "gemma2", "gemma3", "mistral")  # gpt2: absolute positions; then windows of 6
PROMPTS = [(5, 6, 7, 8, 9, 10, 11, 12, 13), (20,), (30, 31, 32), (40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51)]
N = [2, 3, 1, 2]


def policy(family: str = "llama", **extra: Any) -> Any:
    """As a run holds it: fp32, in training, po's scoring and attention installed."""
    net = tiny(family, torch.float32, **extra)
    install(net)
    if problem(net) is None:
        share(net)
    return net


def sampler(net: Any, max_tokens: int = 12, stop: Sequence[int] = (STOP,), pad_id: int = 0, **more: Any) -> HFSampler:
    cut = {k: more.pop(k) for k in ("temperature", "top_p", "top_k") if k in more}
    return HFSampler(net, Sampling(max_tokens, **cut), stop, pad_id, "cpu", **more)


def sampled(draw: HFSampler, prompts: Sequence[tuple[int, ...]], n: int | Sequence[int], seed: int) -> Any:
    """Every prompt by a seed of its own."""
    return draw.sample(prompts, n, [100 * seed + i for i in range(len(prompts))])


@torch.no_grad()
def scored(net: Any, prompt: tuple[int, ...], samples: Sequence[Sampled], temperature: float = 1.0) -> Tensor:
    """po's log-probs of all tokens of a prompt's samples."""
    net.eval()
    stream = pad([(list(prompt), [list(s.ids) for s in samples])], len(samples))
    return score(net, stream, Want(temperature)).logp_T


def recorded(samples: Sequence[Sampled]) -> Tensor:
    return torch.tensor([p for s in samples for p in s.logps])


class Tokens:
    """Counts the tokens that go through a model's embedding."""

    def __init__(self, net: Any) -> None:
        self.shapes: list[tuple[int, ...]] = []
        net.get_input_embeddings().register_forward_hook(lambda m, args, out: self.shapes.append(tuple(args[0].shape)))

    def prompts(self) -> list[tuple[int, ...]]:
        """Of forwards over more than one token."""
        return [s for s in self.shapes if s[1] > 1]


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.5])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_are_those_that_training_computes(family: str, temperature: float) -> None:
    net = policy(family)
    out = sampled(sampler(net, temperature=temperature), PROMPTS, N, 3)
    assert [len(samples) for samples in out] == N
    for prompt, samples in zip(PROMPTS, out):
        torch.testing.assert_close(recorded(samples), scored(net, prompt, samples, temperature), rtol=0, atol=1e-5)


@pytest.mark.parametrize("cut", [{"top_k": 3}, {"top_p": 0.5}, {"top_k": 20, "top_p": 0.7, "temperature": 1.3}])
def test_log_probs_are_of_the_whole_vocabulary_whatever_is_cut(cut: dict[str, Any]) -> None:
    net = policy()
    (samples,) = sampled(sampler(net, **cut), PROMPTS[:1], 4, 0)
    expected = scored(net, PROMPTS[0], samples, cut.get("temperature", 1.0))
    torch.testing.assert_close(recorded(samples), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_plain_generation_of_each_prompt_alone(family: str) -> None:
    out = sampled(sampler(policy(family), temperature=0.0), PROMPTS, 1, 0)
    plain = tiny(family, torch.float32).eval()  # neither po's attention nor its scoring
    settings = GenerationConfig(do_sample=False, max_new_tokens=12, eos_token_id=STOP, pad_token_id=0)
    for prompt, (greedy,) in zip(PROMPTS, out):
        ids = torch.tensor([prompt])
        expected = plain.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        assert list(greedy.ids) == expected[0, len(prompt) :].tolist()
        logits = plain(input_ids=expected[:, :-1]).logits[0, len(prompt) - 1 :]
        torch.testing.assert_close(
            recorded([greedy]), logits.log_softmax(-1).max(-1).values.detach(), rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing(family: str) -> None:
    """A prompt's greedy responses beside longer prompts, whatever the padding token is, and alone."""
    net = policy(family)
    together = sampled(sampler(net, temperature=0.0), PROMPTS, 1, 0)
    assert sampled(sampler(net, temperature=0.0, pad_id=17), PROMPTS, 1, 0) == together
    for prompt, (expected,) in zip(PROMPTS, together):
        ((alone,),) = sampled(sampler(net, temperature=0.0), [prompt], 1, 0)
        assert alone.ids == expected.ids
        torch.testing.assert_close(recorded([alone]), recorded([expected]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_is_computed_once_for_all_its_samples(family: str) -> None:
    net = policy(family)
    seen = Tokens(net)
    sampled(sampler(net, stop=()), [PROMPTS[0]], 8, 0)
    assert seen.shapes[0] == (1, len(PROMPTS[0]) - 1)  # once, less the token whose forward predicts the first ones
    assert seen.shapes[1:] == [(8, 1)] * 12


def chi_square(samples: Sequence[Sampled], probs: dict[tuple[int, ...], float]) -> float:
    seen = Counter(s.ids for s in samples)
    assert set(seen) <= {ids for ids, p in probs.items() if p > 0}
    return sum((seen[ids] - len(samples) * p) ** 2 / (len(samples) * p) for ids, p in probs.items() if p > 0)


CUTS: list[tuple[dict[str, Any], int]] = [({}, 5), ({"temperature": 0.5}, 5), ({"top_k": 3}, 3), ({"top_p": 0.6}, 0)]


@pytest.mark.parametrize(("cut", "kept"), CUTS)
def test_frequencies_are_the_softmax(cut: dict[str, Any], kept: int) -> None:
    """Two tokens of a vocabulary of 5, the second from copied keys and values: 25 outcomes, 4000 draws."""
    net = policy(vocab_size=5)
    with torch.no_grad():
        net.lm_head.weight.mul_(3)
    prompt = (3, 4, 1)
    (samples,) = sampled(sampler(net, 2, stop=(), sequences_per_call=1000, **cut), [prompt], 4000, 1)

    def following(*ids: int) -> Tensor:
        net.eval()
        logits = net(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, -1].detach() / cut.get("temperature", 1.0)
        p, order = logits.softmax(-1).sort(descending=True)
        keep = torch.arange(5) < cut.get("top_k", 5)
        keep &= p.cumsum(0) - p < cut.get("top_p", 1.0)  # the fewest that hold top_p
        return torch.zeros(5).scatter(0, order, p * keep / (p * keep).sum())

    probs = {(a, b): float(following()[a] * following(a)[b]) for a, b in product(range(5), repeat=2)}
    outcomes = sum(p > 0 for p in probs.values())
    assert outcomes == kept**2 if kept else 1 < outcomes < 25
    freedom = outcomes - 1
    assert chi_square(samples, probs) < freedom + 4 * (2 * freedom) ** 0.5
    flat = {ids: 1 / outcomes if p > 0 else 0.0 for ids, p in probs.items()}
    assert chi_square(samples, flat) > 100  # the test tells another distribution


def test_a_seed_decides_the_samples_and_nothing_else_does() -> None:
    net = policy()
    draw = sampler(net)
    first = sampled(draw, PROMPTS, N, 5)
    torch.manual_seed(99)
    torch.rand(3)
    assert sampled(draw, PROMPTS, N, 5) == first
    assert sampled(sampler(policy()), PROMPTS, N, 5) == first
    assert sampled(draw, PROMPTS, N, 6) != first
    for order in ((2,), (3, 1), (3, 2, 1, 0)):  # neither company nor place matters
        seeds = [500 + i for i in order]
        again = draw.sample([PROMPTS[i] for i in order], [N[i] for i in order], seeds)
        for i, found in zip(order, again, strict=True):
            assert [s.ids for s in found] == [s.ids for s in first[i]]
    flat = [s.ids for samples in sampled(draw, [PROMPTS[0], PROMPTS[0]], 4, 0) for s in samples]
    assert len(set(flat)) == 8  # the samples of equal prompts differ too


def test_the_random_state_is_left_as_it_was() -> None:
    net = policy()
    torch.manual_seed(4)
    before = torch.get_rng_state()
    sampled(sampler(net), PROMPTS, 1, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_model_is_left_as_it_was() -> None:
    net = policy()
    net.gradient_checkpointing_enable({"use_reentrant": False})
    net.model.layers[0].eval()
    net.generation_config.top_k = 7

    def state() -> list[Any]:
        flags = [(m.training, getattr(m, "gradient_checkpointing", None)) for m in net.modules()]
        weights = [p.clone() for p in net.parameters()]
        return [flags, net.generation_config.to_dict(), net.forward, *map(torch.Tensor.tolist, weights)]

    before = state()
    assert before[0].count((True, True)) > 0
    sampled(sampler(net), PROMPTS, 1, 0)
    assert state() == before
    stream = pad([([5, 6], [[7, 8]])], 1)
    score(net, stream).logp_T.sum().backward()  # still scores, with a gradient
    assert net.lm_head.weight.grad is not None


def test_settings_that_a_model_ships_with_play_no_part() -> None:
    expected = sampled(sampler(policy()), PROMPTS, 2, 0)
    net = policy()
    net.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.2,
        top_k=1,
        top_p=0.1,
        repetition_penalty=5.0,
        max_length=3,
        min_new_tokens=12,
        eos_token_id=9,
        suppress_tokens=list(range(3, 50)),
        num_beams=3,
    )
    assert sampled(sampler(net), PROMPTS, 2, 0) == expected


def test_dropout_and_gradient_checkpointing_are_off_meanwhile() -> None:
    quiet, noisy = policy(), policy(attention_dropout=0.5)
    noisy.gradient_checkpointing_enable()
    seen = Tokens(noisy)
    assert sampled(sampler(noisy), PROMPTS, 2, 0) == sampled(sampler(quiet), PROMPTS, 2, 0)
    assert len(seen.prompts()) == 1  # one forward over the prompts: the cache was in use


def test_a_response_ends_with_its_stop_token() -> None:
    net = policy()
    samples = [s for some in sampled(sampler(net, 40, stop=(2, 3, 4, 7)), PROMPTS, 8, 0) for s in some]
    assert {s.ended for s in samples} == {True, False}
    assert len({s.ids[-1] for s in samples if s.ended}) > 1
    for s in samples:
        inside = s.ids[:-1] if s.ended else s.ids
        assert s.ended == (s.ids[-1] in (2, 3, 4, 7))
        assert not set(inside) & {2, 3, 4, 7}
        assert len(s.logps) == len(s.ids)
        assert s.ended or len(s.ids) == 40


def test_the_padding_token_may_be_the_stop_token_and_be_sampled() -> None:
    net = policy()
    (a,) = sampled(sampler(net, stop=(5,), pad_id=5), PROMPTS[:1], 8, 0)  # also the prompt's first token
    (b,) = sampled(sampler(net, stop=(5,), pad_id=0), PROMPTS[:1], 8, 0)
    assert a == b


def test_nothing_to_sample() -> None:
    draw = sampler(policy())
    assert sampled(draw, [], 3, 0) == []
    assert sampled(draw, PROMPTS, [0, 1, 0, 0], 0)[0] == []
    with pytest.raises(AssertionError, match="a prompt without tokens"):
        sampled(draw, [()], 1, 0)
    with pytest.raises(AssertionError, match="2 numbers of samples for 1 prompts"):
        sampled(draw, [(5,)], [1, 2], 0)


def test_calls_hold_no_more_sequences_than_asked() -> None:
    net = policy("gpt2")
    seen = Tokens(net)
    out = sampled(sampler(net, stop=(), sequences_per_call=3, temperature=0.0), PROMPTS, N, 0)
    assert max(rows for rows, _ in seen.shapes) == 3
    whole = sampled(sampler(net, stop=(), temperature=0.0), PROMPTS, N, 0)
    assert [[s.ids for s in some] for some in out] == [[s.ids for s in some] for some in whole]


def test_steps_that_generate_takes_back_are_not_recorded() -> None:
    """On GPUs it looks late whether all rows have ended."""
    torch.manual_seed(0)
    logits_TBV, width = torch.randn(4, 2, 9), 3
    rows = [torch.Generator().manual_seed(i) for i in range(2)]
    record = Chosen(Choose(Sampling(4, 0.5), rows, torch.device("cpu")), width)
    ids_BL = torch.zeros(2, width, dtype=torch.long)
    for logits_BV in logits_TBV:
        only_BV = record(ids_BL, logits_BV)
        assert (only_BV > -torch.inf).sum(-1).tolist() == [1, 1]
        ids_BL = torch.cat((ids_BL, only_BV.argmax(-1, keepdim=True)), 1)
    logp_BTV = (logits_TBV / 0.5).log_softmax(-1).transpose(0, 1)
    expected_BT = logp_BTV.gather(-1, ids_BL[:, width:, None])[..., 0]
    for kept in (4, 3, 2, 1):
        torch.testing.assert_close(record.logps(kept), expected_BT[:, :kept])


@pytest.mark.parametrize("vocabulary", [5, 128, 300])
def test_a_draw_is_the_inverse_of_the_cumulative_sum(vocabulary: int) -> None:
    """Tokens of one block, of a whole one, of several and a part; some without any probability, at both ends too."""
    torch.manual_seed(vocabulary)
    prob_V = 0.2 + torch.rand(vocabulary)
    prob_V[torch.rand(vocabulary) < 0.3] = 0
    prob_V[[0, 1, -1]] = 0
    prob_V /= prob_V.sum()
    end_V = prob_V.double().cumsum(0) / prob_V.double().sum()
    random_R = torch.tensor([i / 3000 for i in range(3000)] + [1 - 2**-53], dtype=torch.float64)
    token_R = drawn(prob_V.expand(len(random_R), -1), random_R)
    assert (prob_V[token_R] > 0).all()
    start_R = torch.where(token_R > 0, end_V[(token_R - 1).clamp_min(0)], 0.0)
    assert (start_R - 1e-6 <= random_R).all()
    assert (random_R < end_V[token_R] + 1e-6).all()
    assert len(token_R.unique()) == (prob_V > 0).sum()


def test_responses_may_outgrow_the_room_that_keys_and_values_have() -> None:
    net = policy(max_position_embeddings=512)
    (samples,) = sampled(sampler(net, 300, stop=()), PROMPTS[:1], 2, 0)
    assert [len(s.ids) for s in samples] == [300, 300]
    torch.testing.assert_close(recorded(samples), scored(net, PROMPTS[0], samples), rtol=0, atol=1e-5)


def test_rows_that_have_ended_cost_nothing_more() -> None:
    net = policy()
    seen = Tokens(net)
    stops = tuple(range(2, 12))
    (samples,) = sampled(sampler(net, 60, stop=stops), [PROMPTS[0]], 40, 0)
    rows = [rows for rows, columns in seen.shapes if columns == 1]
    assert rows == sorted(rows, reverse=True)
    assert rows[0] == 40
    needed = sum(len(s.ids) for s in samples)
    assert needed <= sum(rows) < 1.5 * needed < 40 * max(len(s.ids) for s in samples)


# Models that wrap, and models without a cache that can be copied


def lora(net: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_dropout=0.5, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(net, config).train()


class Wrapped(nn.Module):
    """What DDP is to those who look inside."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def test_the_adapter_is_in_force_unless_it_is_off() -> None:
    base = sampled(sampler(policy()), PROMPTS, 2, 0)
    net = Wrapped(lora(policy()))
    on = sampled(sampler(net), PROMPTS, 2, 0)
    assert sampled(sampler(net, adapter=False), PROMPTS, 2, 0) == base
    assert on != base
    torch.testing.assert_close(recorded(on[0]), scored(net.module, PROMPTS[0], on[0]), rtol=0, atol=1e-5)
    assert sampled(sampler(net), PROMPTS, 2, 0) == on  # and on again
    with pytest.raises(AssertionError, match="has no adapter"):
        sampled(sampler(policy(), adapter=False), PROMPTS, 2, 0)


def test_samples_follow_the_weights() -> None:
    net = policy()
    draw = sampler(net, temperature=0.0)
    before = sampled(draw, PROMPTS, 1, 0)
    with torch.no_grad():
        net.lm_head.weight.neg_()
    assert sampled(draw, PROMPTS, 1, 0) != before
    draw.update(policy())
    assert sampled(draw, PROMPTS, 1, 0) == before


def test_mixed_precision_is_the_trainers() -> None:
    net = policy()
    (samples,) = sampled(sampler(net, autocast=torch.bfloat16), PROMPTS[:1], 4, 0)
    with torch.autocast("cpu", torch.bfloat16):
        alike = scored(net, PROMPTS[0], samples)
    gap, apart = ((recorded(samples) - x).abs().mean() for x in (alike, scored(net, PROMPTS[0], samples)))
    assert 0 < gap < apart  # bf16 rounds by shape; it is nearer to itself than to fp32


def test_a_recurrent_model_computes_a_prompt_for_each_sample() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    net = MambaForCausalLM(
        MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4, eos_token_id=2)
    )
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    assert not copies(net.eval())
    seen = Tokens(net)
    out = sampled(sampler(net, temperature=0.0), PROMPTS, N, 0)
    assert sum(rows for rows, _ in seen.prompts()) == sum(n for n, p in zip(N, PROMPTS) if len(p) > 1)
    assert [len(s) for s in out] == N
    for prompt, samples in zip(PROMPTS, out):
        for s in samples:
            logits = net(input_ids=torch.tensor([[*prompt, *s.ids]])).logits[0, len(prompt) - 1 : -1]
            best = logits.log_softmax(-1).max(-1)
            assert best.indices.tolist() == list(s.ids)
            torch.testing.assert_close(recorded([s]), best.values.detach(), rtol=0, atol=1e-4)


def test_a_partitioned_model_needs_its_engine() -> None:
    net = policy()
    next(net.parameters()).ds_id = 0  # as DeepSpeed marks it
    with pytest.raises(UserError, match="expected the engine"):
        sampled(sampler(net), PROMPTS, 1, 0)


ZERO3 = """
import json, sys
import deepspeed, torch
sys.path.insert(0, {tests!r})
from test_rollout_sampler import PROMPTS, lora, policy, sampled, sampler
from po.forest import pad
from po.hardening import keep_shm_clean
from po.logprob import score

def steps(between):
    net = lora(policy()) if {adapter} else policy()
    if {zero}:
        config = {{"train_micro_batch_size_per_gpu": 1, "zero_optimization": {{"stage": 3,
                   "stage3_param_persistence_threshold": 0}}, "zero_allow_untested_optimizer": True,
                   "gradient_clipping": 0.0}}
        trained = [p for p in net.parameters() if p.requires_grad]
        net, *_ = deepspeed.initialize(model=net, optimizer=torch.optim.SGD(trained, 0.5), config=config)
        step = lambda loss: (net.backward(loss), net.step())
    else:
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.5)
        step = lambda loss: (loss.backward(), optimizer.step(), optimizer.zero_grad())
    net.eval()
    seen = []
    for i in range(3):
        if between:
            mine = PROMPTS[: 4 - 3 * rank]  # rank 1 has fewer prompts, and shorter responses
            seen.append([[s.ids for s in some] for some in sampled(sampler(net, 12 - 6 * rank), mine, 2, i)])
            if {adapter}:
                seen.append([[s.ids for s in some] for some in sampled(sampler(net, adapter=False), mine, 1, i)])
        logp_T = score(net, pad([([5, 6, 7], [[8, 9, 2], [30, 2]])], 2)).logp_T
        seen.append(round(float(logp_T.sum()), 4))
        step(-logp_T.mean())
    return seen

rank = 0
if {zero}:
    keep_shm_clean()
    deepspeed.init_distributed()
    rank = torch.distributed.get_rank()
found = {{"sampling": steps(True), "not": steps(False)}}
json.dump(found, open({out!r} + f"/rank{{rank}}-{zero}.json", "w"))
"""


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [False, True])
def test_zero3_samples_as_one_process_does_and_trains_on(adapter: bool, tmp_path: Path) -> None:
    def run(zero: bool, *launcher: str) -> list[Any]:
        script = tmp_path / f"run{zero}.py"
        script.write_text(ZERO3.format(tests=str(ROOT / "tests"), adapter=adapter, zero=zero, out=str(tmp_path)))
        env = os.environ | {"DS_ACCELERATOR": "cpu", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
        done = subprocess.run([*launcher, str(script)], env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
        return [json.loads((tmp_path / f"rank{r}-{zero}.json").read_text()) for r in range(1 + zero)]

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    (alone,) = run(False, sys.executable)
    first, second = run(True, str(BIN / "deepspeed"), "--num_accelerators", "2", "--master_port", port)
    assert first == alone
    assert [x for x in first["sampling"] if isinstance(x, float)] == first["not"] == second["not"]
    assert len(set(first["not"])) == 3
    assert [len(x) for x in second["sampling"] if isinstance(x, list)] == [1] * (6 if adapter else 3)


def test_the_cache_of_every_family_can_be_copied() -> None:
    for family in FAMILIES:
        net = policy(family)
        assert copies(net)
        kinds = {type(layer).__name__ for layer in DynamicCache(config=net.config).layers}
        assert ("DynamicSlidingWindowLayer" in kinds) == (family in ("qwen2", "gemma2", "gemma3", "mistral"))
