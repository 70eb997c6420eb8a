"""Where SparsePO's learned masks put their weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from harness.stats import interval
from harness.world import World

from claims.lab import Finding, Lab, distinct, minus
from po.gates import gates_of

LAMBDAS = (0.0, 0.001, 0.01)
CLASSES = ("words", "punctuation")


def sparse_masks(lab: Lab, seeds: Sequence[int] = (0, 1, 2)) -> Finding:
    """Share of tokens without weight, and mean weight by what the token is, over L1 penalties."""
    finding = Finding(
        "SparsePO's masks become sparse and weigh the words that carry the reward",
        "Christopoulou et al. 2024 (arXiv:2410.05102): learned masks leave many tokens without weight, the more the "
        "stronger the L1 penalty, and concentrate on tokens that matter for the preference.",
        "50 steps of 8 pairs, beta 0.1, simple_all, one mask for reward and KL; then the mask on best and worst "
        "answers to held-out questions. The reward counts words; punctuation and the end do not enter it.",
        (
            "lambda",
            "tokens without weight, start",
            "end",
            "mean weight: words",
            "punctuation, end",
            "words / all",
            "reward",
        ),
    )
    path = lab.rows("scored", distinct(lab.world.train))
    got: dict[float, list[dict[str, float]]] = {}
    for lam in LAMBDAS:
        got[lam] = [_one(lab, path, lam, seed) for seed in seeds]
        names = ("before", "after", "words", "punctuation", "focus", "reward")
        finding.rows.append((f"{lam:g}", *(interval([g[n] for g in got[lam]]).text() for n in names)))
    strong, none = got[LAMBDAS[-1]], got[0.0]
    zero = {lam: [g["after"] for g in found] for lam, found in got.items()}
    finding.expect(
        f"share without weight grows in training (lambda {LAMBDAS[1]:g})",
        minus(zero[LAMBDAS[1]], [g["before"] for g in got[LAMBDAS[1]]]),
    )
    finding.expect(
        f"share without weight: lambda {LAMBDAS[-1]:g} above 0",
        minus([g["after"] for g in strong], [g["after"] for g in none]),
    )
    for lam in LAMBDAS[:2]:
        finding.expect(
            f"mean weight on words over that on all tokens, above 1 (lambda {lam:g})",
            [g["focus"] for g in got[lam]],
            least=1.0,
        )
    return finding


def _one(lab: Lab, path: Any, lam: float, seed: int) -> dict[str, float]:
    term = {"head": "sparsepo", "beta": 0.1, "lambda_u": lam, "lambda_d": lam}
    torch.manual_seed(seed)
    trained = lab.train(term, path, seed, 50, reference="adapter_off")
    masks = weights(lab.world, trained.network)
    first = next((m for m in trained.log if "sparsepo/on_u" in m), {})
    every = torch.cat(list(masks.values()))
    mean = {name: masks[name].mean().item() for name in CLASSES}
    return {
        "before": 1 - first.get("sparsepo/on_u", float("nan")),
        "after": (every == 0).double().mean().item(),
        "focus": mean["words"] / max(every.mean().item(), 1e-12),
        "reward": lab.score(trained.plain, seed)["reward"],
        **mean,
    }


@torch.no_grad()
def weights(world: World, network: Any) -> Mapping[str, torch.Tensor]:
    """The mask's weights on the watched answers' tokens, by what the token belongs to."""
    gates = gates_of(network)
    assert gates is not None, "the head built no masks"
    out: dict[str, list[torch.Tensor]] = {name: [] for name in CLASSES}
    for prompt, *answers in world.watched:
        for answer in answers:
            s = world.encode(prompt, answer)
            ids = torch.tensor([s.prompt_ids + s.response_ids])
            states = world.model(input_ids=ids, output_hidden_states=True).hidden_states
            hidden_TLD = torch.stack([h[0, len(s.prompt_ids) - 1 : -1] for h in states], 1)
            weight_T = gates(None, hidden_TLD)["0.mask_u"]
            word_T = torch.tensor([_is_word(world, i) for i in s.response_ids])
            out["words"].append(weight_T[word_T])
            out["punctuation"].append(weight_T[~word_T])
    return {name: torch.cat(found) for name, found in out.items()}


def _is_word(world: World, token: int) -> bool:
    text = world.tokenizer.decode([token])
    return token != world.tokenizer.eos_token_id and any(c.isalpha() for c in text)
