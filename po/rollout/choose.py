"""Draws of next tokens, each row from random numbers of its own, with the log-prob of what was drawn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from po.rollout.sampler import Sampling

_BLOCK = 128


class Choose:
    """One random number a token: where it falls in the softmax's cumulative sum is the token. They are drawn from each
    row's generator beforehand, so that a sample depends on nothing else in its call."""

    def __init__(self, sampling: Sampling, generators: Sequence[torch.Generator], device: torch.device) -> None:
        self._temperature, self._greedy = sampling.logp_temperature, sampling.temperature == 0
        self._cuts = LogitsProcessorList()
        if sampling.top_k and not self._greedy:
            self._cuts.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1 and not self._greedy:
            self._cuts.append(TopPLogitsWarper(sampling.top_p))
        size, f64 = sampling.max_tokens, torch.float64
        self._random_BT = torch.stack([torch.rand(size, generator=g, dtype=f64, device=device) for g in generators])

    def __call__(self, logits_RV: Tensor, t: int, row_R: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens at place t of some rows, and their log-probs under the whole softmax (before top_k and top_p)."""
        logits_RV = logits_RV.float()
        if self._temperature != 1:
            logits_RV = logits_RV / self._temperature
        whole_RV = logits_RV.softmax(-1)
        if self._greedy:
            token_R = logits_RV.argmax(-1)
        else:
            kept_RV = self._cuts(None, logits_RV).softmax(-1) if self._cuts else whole_RV
            token_R = drawn(kept_RV, self._random_BT[row_R, t])
        return token_R, whole_RV.gather(-1, token_R[:, None])[:, 0].log()


def drawn(prob_RV: Tensor, random_R: Tensor) -> Tensor:
    """The token whose stretch of the cumulative sum holds random_R, in [0, 1): a token of probability 0 never is.
    First the block of tokens, then the token in it, in double: a sum over the whole vocabulary would be ten times as
    slow there, and in fp32 it would round rare tokens away."""
    V = prob_RV.shape[-1]
    whole = V // _BLOCK * _BLOCK
    blocks_RN = prob_RV[:, :whole].unflatten(-1, (-1, _BLOCK)).sum(-1)
    blocks_RN = torch.cat((blocks_RN, prob_RV[:, whole:].sum(-1, keepdim=True)), -1)
    block_R, inside_R = _stretch(blocks_RN.double(), random_R)
    index_RC = block_R[:, None] * _BLOCK + torch.arange(_BLOCK, device=prob_RV.device)
    inner_RC = prob_RV.gather(-1, index_RC.clamp(max=V - 1)).double() * (index_RC < V)
    token_R, _ = _stretch(inner_RC, inside_R)
    return block_R * _BLOCK + token_R


def _stretch(weight_RN: Tensor, random_R: Tensor) -> tuple[Tensor, Tensor]:
    """Which of N stretches holds this share of their sum, and how far into it, in [0, 1)."""
    end_RN = weight_RN.cumsum(-1)
    total_R = end_RN[:, -1]
    at_R = torch.minimum(random_R * total_R, torch.nextafter(total_R, torch.zeros_like(total_R)))
    k_R1 = torch.searchsorted(end_RN, at_R[:, None], right=True)
    size_R = weight_RN.gather(-1, k_R1)[:, 0]
    return k_R1[:, 0], (at_R - (end_RN.gather(-1, k_R1)[:, 0] - size_R)).clamp_min(0) / size_R


class Chosen(LogitsProcessor):
    """For `generate`, told always to take the likeliest token: makes it the one that `choose` draws. width: of the
    prompts. Log-probs are kept until asked for; on GPUs generate looks late whether all rows have ended, and takes
    later steps back."""

    def __init__(self, choose: Choose, width: int) -> None:
        self._choose, self._width = choose, width
        self._logps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        row_B = torch.arange(len(scores), device=scores.device)
        token_B, logp_B = self._choose(scores, input_ids.shape[1] - self._width, row_B)
        self._logps.append(logp_B)
        return torch.full_like(scores, -torch.inf).scatter_(-1, token_B[:, None], 0)

    def logps(self, T: int) -> Tensor:
        """(B, T), of the first T tokens."""
        return torch.stack(self._logps[:T], 1)
