"""A few rows of logits: what is read off them, and the gradient with respect to what the LM head put out."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from po.scores import Shape, Want


class Part(NamedTuple):
    """What is known of a chunk of C rows."""

    hidden: Tensor  # (C, D)
    target: Tensor  # (C,)
    candidate: Tensor | None  # (C, M)
    ref: Tensor | None  # (C, D), what the reference's head is given


class Grad(NamedTuple):
    """What comes back for the scores of a chunk: (C,), (C, M), (C,)."""

    logp: Tensor
    candidate: Tensor | None
    kl: Tensor | None


class Chunk(NamedTuple):
    """Logits of C rows and their softmax, both (C, V)."""

    logits: Tensor
    prob: Tensor

    def top(self) -> tuple[Tensor, Tensor]:
        """The largest logit and the logsumexp, each (C,)."""
        top = self.logits.amax(-1)
        return top, top - self.prob.amax(-1).log()  # the likeliest token's probability is exp(top - logsumexp)

    def score(self, want: Want, part: Part, ref: Chunk | None) -> tuple[Tensor | None, ...]:
        """The first six of Scores; overwrites the reference's logits."""
        top, lse = self.top()
        at = self.logits.gather(-1, part.target[:, None])[:, 0]
        ent = lse - torch.linalg.vecdot(self.prob, self.logits) if want.entropy else torch.zeros_like(lse)
        collision = torch.linalg.vecdot(self.prob, self.prob).log() if want.collision else None
        given = kl = None
        if (c := part.candidate) is not None:
            given = (self.logits.gather(-1, c.clamp(min=0)) - lse[:, None]).masked_fill_(c < 0, 0)
        if ref is not None:
            _, ref_lse = ref.top()
            kl = torch.linalg.vecdot(ref.prob, ref.logits.sub_(self.logits)) - (ref_lse - lse)
        return at - lse, ent, at >= top, collision, given, kl

    def slope(self, part: Part, shape: Shape) -> Tensor:
        """d logp / d raw, (C, V); overwrites the softmax."""
        slope = self.prob.neg_()
        slope.scatter_add_(-1, part.target[:, None], torch.ones_like(slope[:, :1]))
        return _through(slope, self.logits, shape)


def pull(
    part: Part, grad: Grad, shape: Shape, logits: Tensor | None, prob: Tensor, ref_prob: Tensor | None
) -> tuple[Tensor, Tensor]:
    """d (grad . scores) / d raw as rows (C, V) of size about 1, so that small gradients do not vanish in 16 bits, and
    what to multiply them by (C,). The logits are read with soft-capping only."""
    total, size = grad.logp, grad.logp.abs()
    if (c := part.candidate) is not None and grad.candidate is not None:
        g_CM = grad.candidate.masked_fill(c < 0, 0)
        total, size = total + g_CM.sum(-1), size + g_CM.abs().sum(-1)
    if ref_prob is not None and grad.kl is not None:
        total, size = total - grad.kl, size + grad.kl.abs()
    unit = torch.where(size > 0, 1 / size, 0)[:, None]
    slope = prob * (-total[:, None] * unit)
    slope.scatter_add_(-1, part.target[:, None], grad.logp[:, None] * unit)
    if c is not None and grad.candidate is not None:
        slope.scatter_add_(-1, c.clamp(min=0), g_CM * unit)
    if ref_prob is not None and grad.kl is not None:
        slope.addcmul_(ref_prob, grad.kl[:, None] * unit, value=-1)
    return _through(slope, logits, shape), size


def _through(slope: Tensor, logits: Tensor | None, shape: Shape) -> Tensor:
    """From the gradient with respect to logits to that of the head's output, in place."""
    if shape.softcap is not None:
        assert logits is not None
        slope *= 1 - (logits * (shape.temperature / shape.softcap)) ** 2
    factor = shape.scale / shape.temperature
    return slope if factor == 1.0 else slope.mul_(factor)
