"""Where SparsePO's learned masks put their weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from harness.stats import interval
from harness.world import World

from claims.lab import Finding, Lab, distinct, minus
from po.gates import gates_of
from po.sandbox import reward
from po.sandbox.sampling import Conversation, Sample

LAMBDAS = (0.0, 1e-4, 1e-3)
Answer = tuple[Conversation, Sample]


def sparse_masks(lab: Lab, seeds: Sequence[int] = (0, 1, 2)) -> Finding:
    """Share of tokens without weight, and what the tokens with weight are worth, over L1 penalties."""
    finding = Finding(
        "SparsePO's masks become sparse and weigh the words that carry the reward",
        "Christopoulou et al. 2024 (arXiv:2410.05102): learned masks leave many tokens without weight, the more the "
        "stronger the L1 penalty, and concentrate on tokens that matter for the preference.",
        "50 steps of 8 pairs, beta 0.1, simple_all, one mask for reward and KL; then the mask on answers to held-out "
        "questions. What a token carries: |expected true reward after it - before it|, by 16 answers that the base "
        "completes from there. Focus: that, averaged with the mask's weights, over its plain average; 1 is a mask that "
        "does not know. A mask that is 0 everywhere has none.",
        ("lambda", "without weight, start", "end", "mean weight", "masks left", "focus", "true reward"),
    )
    path = lab.rows("scored", distinct(lab.world.train))
    answers = [(p, lab.world.encode(p, a)) for p, *both in lab.world.watched[:16] for a in both]
    worth_T = torch.cat([_credit(lab.world, a).abs() for a in answers])
    got = {lam: [_one(lab, path, lam, seed, answers, worth_T) for seed in seeds] for lam in LAMBDAS}
    for lam, found in got.items():
        alive = [f["focus"] for f in found if not math.isnan(f["focus"])]
        cells = [interval([f[n] for f in found]).text() for n in ("start", "end", "weight")]
        focus = interval(alive).text(2) if alive else ""
        reached = interval([f["reward"] for f in found]).text()
        finding.rows.append((f"{lam:g}", *cells, f"{len(alive)} of {len(found)}", focus, reached))
    ends, starts = ({lam: [f[n] for f in found] for lam, found in got.items()} for n in ("end", "start"))
    for lam in LAMBDAS:
        finding.expect(f"lambda {lam:g}: more tokens without weight than at the start", minus(ends[lam], starts[lam]))
    finding.expect(f"tokens without weight: lambda {LAMBDAS[-1]:g} above 0", minus(ends[LAMBDAS[-1]], ends[0.0]))
    for lam, found in got.items():
        alive = [f["focus"] for f in found if not math.isnan(f["focus"])]
        if len(alive) > 1:
            finding.expect(f"lambda {lam:g}: focus above 1", alive, least=1.0)
    return finding


def _one(
    lab: Lab, path: Any, lam: float, seed: int, answers: Sequence[Answer], worth_T: torch.Tensor
) -> dict[str, float]:
    term = {"head": "sparsepo", "beta": 0.1, "lambda_u": lam, "lambda_d": lam}
    trained = lab.train(term, path, seed, 50, reference="adapter_off", train={"logging_steps": 1})
    first = next(line for line in trained.log if "sparsepo/on_u" in line)
    weight_T = _weights(lab.world, trained.network, answers)
    total = weight_T.sum().item()
    return {
        "start": 1 - first["sparsepo/on_u"],
        "end": (weight_T == 0).double().mean().item(),
        "weight": weight_T.mean().item(),
        "focus": (weight_T * worth_T).sum().item() / total / worth_T.mean().item() if total else math.nan,
        "reward": lab.score(trained.plain, seed)["reward"],
    }


@torch.no_grad()
def _weights(world: World, network: Any, answers: Sequence[Answer]) -> torch.Tensor:
    """The mask's weight on each token of the answers."""
    gates = gates_of(network)
    assert gates is not None, "the head built no masks"
    out = []
    for _, s in answers:
        ids = torch.tensor([s.prompt_ids + s.response_ids])
        states = world.model(input_ids=ids, output_hidden_states=True).hidden_states
        hidden_TLD = torch.stack([h[0, len(s.prompt_ids) - 1 : -1] for h in states], 1)
        out.append(gates(None, hidden_TLD)["0.mask_u"])
    return torch.cat(out)


@torch.no_grad()
def _credit(world: World, answer: Answer, count: int = 16) -> torch.Tensor:
    """Expected true reward after each token minus that before it, by completions of the base. (T,)"""
    prompt, s = answer
    prefixes = [s.response_ids[:t] for t in range(len(s.response_ids)) for _ in range(count)]
    whole = [torch.tensor(s.prompt_ids + p).flip(0) for p in prefixes]
    pad = world.tokenizer.pad_token_id
    ids = torch.nn.utils.rnn.pad_sequence(whole, batch_first=True, padding_value=-1).flip(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = world.model.generate(
            input_ids=ids.clamp(min=0).where(ids >= 0, pad),
            attention_mask=(ids >= 0).long(),
            do_sample=True,
            top_k=0,
            max_new_tokens=48,
            pad_token_id=pad,
            eos_token_id=world.tokenizer.eos_token_id,
        )[:, ids.shape[1] :]
    found = [reward(prompt, _text(world, [*p, *m])) for p, m in zip(prefixes, made.tolist())]
    before_T = torch.tensor(found).view(-1, count).mean(1)
    return torch.cat((before_T[1:], torch.tensor([reward(prompt, s.text)]))) - before_T


def _text(world: World, ids: Sequence[int]) -> str:
    eos = world.tokenizer.eos_token_id
    ended = ids[: list(ids).index(eos)] if eos in ids else ids
    return str(world.tokenizer.decode(list(ended), skip_special_tokens=False)).strip()
