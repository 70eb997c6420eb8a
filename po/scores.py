"""What `po.logprob.score` is asked for and what it gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Shape(NamedTuple):
    """What becomes of a head's output before the softmax: logits = cap * tanh(scale * raw / cap) / temperature."""

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def logits(self, raw: Tensor) -> Tensor:
        """The logits from the head's raw output, in fp32 (float64 stays)."""
        logits = raw if raw.dtype == torch.float64 else raw.float()
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits if self.temperature == 1.0 else logits / self.temperature


class Against(NamedTuple):
    """The reference's distributions, in the form that costs little: what its LM head would be given, and the head.

    head: None for the scored model's own head as it is with the adapter off; `shape` then does not count.
    """

    final_TD: Tensor
    head: nn.Module | None = None
    shape: Shape = Shape()


@dataclass(frozen=True)
class Want:
    """What to give besides log-probs and hits. Hidden states have no gradient unless `hidden_gradient` asks for it."""

    temperature: float = 1.0  # everything is that of softmax(logits / temperature)
    entropy: bool = False
    collision: bool = False
    candidate_TM: Tensor | None = None  # int64 token ids whose log-probs are wanted, -1 for none
    kl_against: Against | None = None
    hidden: bool = False
    hidden_gradient: bool = False  # for who trains the backbone through them; value heads do not
    final: bool = False
    gates: bool = False  # what the modules of `po.gates` make of hidden states
    ref_hidden_TLD: Tensor | None = None  # the reference's, for gates that read those


class Scores(NamedTuple):
    """Per response token, in the stream's order, fp32 (float64 for a float64 model). None: was not asked for.

    With gradient: logp_T, candidate_TM, token_kl_T, gates; hidden_TLD and final_TD only where Want says so.
    """

    logp_T: Tensor
    entropy_T: Tensor  # of the distribution that the token was drawn from, nats; zeros where it was not asked for
    correct_T: Tensor  # bool, whether the token was the most likely one
    collision_T: Tensor | None = None  # log sum_v pi(v)^2
    candidate_TM: Tensor | None = None  # log pi of the ids asked for; 0, without gradient, where there is none
    token_kl_T: Tensor | None = None  # KL(reference || policy) over the vocabulary
    hidden_TLD: Tensor | None = None  # of the embeddings and of each layer, the last after the final norm; own dtype
    final_TD: Tensor | None = None  # what the LM head is given; the model's own dtype
    gates: Mapping[str, Tensor] | None = None  # "i.NAME" of term i, (T,)
