"""The nouns. Dimension key: G groups (prompts), K most responses of a group, S positions of the packed stream,
T response tokens (flat, never padded), D hidden size, V vocabulary, E embedding size, M tokens that a teacher scored.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

Unit = Literal["group", "response", "token"]
Layout = Literal["pair", "set", "unpaired", "labelled", "best"]


@dataclass(frozen=True)
class Segments:
    """Where each response token sits in the (G, K) grid: ragged where it costs, rectangular where it reads."""

    slot_T: Tensor  # int64, g * K + k of the response that owns token t
    valid_GK: Tensor  # bool, False where the group has fewer than K responses

    def sum(self, x_T: Tensor) -> Tensor:
        """Add up each response's tokens: (T,) -> (G, K); 0 where there is no response."""
        out = x_T.new_zeros(self.valid_GK.numel())
        return out.index_add(0, self.slot_T, x_T).view(self.valid_GK.shape)

    def mean(self, x_T: Tensor) -> Tensor:
        """Average over each response's tokens: (T,) -> (G, K); 0 where there is no response."""
        return self.sum(x_T) / self.length_GK.clamp(min=1)

    def spread(self, x_GK: Tensor) -> Tensor:
        """Give every token its response's value: (G, K) -> (T,)."""
        return x_GK.flatten()[self.slot_T]

    @property
    def length_GK(self) -> Tensor:
        """Response lengths in tokens, EOS included. Never inferred from values: a zero log-ratio is still a token."""
        return self.sum(torch.ones_like(self.slot_T))


def _given(x: Tensor | None, name: str, need: str) -> Tensor:
    if x is None:
        raise LookupError(f"the head reads {name} but does not declare it: add {need} to its Needs")
    return x


@dataclass(frozen=True)
class HeadInput:
    """All that a head may look at. What its Needs do not declare is absent, and reading it says which Need to add."""

    seg: Segments
    policy_T: Tensor  # log pi(y_t | x, y_<t), fp32, carries the gradient
    ref: Tensor | None = None
    old: Tensor | None = None
    token_kl: Tensor | None = None
    collision: Tensor | None = None
    differs: Tensor | None = None
    candidate: Tensor | None = None
    teacher: Tensor | None = None
    teacher_ref: Tensor | None = None
    reward: Tensor | None = None
    label: Tensor | None = None
    embedding: Tensor | None = None
    prompt_embedding: Tensor | None = None
    mismatch: Tensor | None = None
    row: Tensor | None = None
    privileged: Tensor | None = None
    correction: Tensor | None = None
    progress: Tensor | None = None
    best_first: bool = False  # the responses stand best first, whatever their rewards say: pairs
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    response_columns: Mapping[str, Tensor] = field(default_factory=dict)
    token_columns: Mapping[str, Tensor] = field(default_factory=dict)
    gates: Mapping[str, Tensor] = field(default_factory=dict)
    old_gates: Mapping[str, Tensor] = field(default_factory=dict)
    state: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def ref_T(self) -> Tensor:
        """log ref(y_t | x, y_<t), fp32, no gradient. (T,)"""
        return _given(self.ref, "ref_T", "reference=True")

    @property
    def old_T(self) -> Tensor:
        """log mu(y_t | x, y_<t), fp32, no gradient: of rollouts, under the policy as it was when it sampled y, by the
        same routine as policy_T; of rows from a file, what they carry. (T,)"""
        return _given(self.old, "old_T", "behaviour=True")

    @property
    def token_kl_T(self) -> Tensor:
        """KL(ref || policy) over the vocabulary at each response position, with gradient. (T,)"""
        return _given(self.token_kl, "token_kl_T", "token_kl=True")

    @property
    def collision_T(self) -> Tensor:
        """log sum_v pi(v)^2 at each response position, no gradient. (T,)"""
        return _given(self.collision, "collision_T", "collision=True")

    @property
    def differs_T(self) -> Tensor:
        """Whether the token is part of an edit between the two responses of its pair. (T,) bool"""
        return _given(self.differs, "differs_T", "differs=True")

    @property
    def candidate_TM(self) -> Tensor:
        """log pi of the tokens that a teacher scored at each response position, with gradient. (T, M)"""
        return _given(self.candidate, "candidate_TM", "teacher=True")

    @property
    def teacher_TM(self) -> Tensor:
        """The teacher's log-probs of those tokens; -inf where it scored fewer than M. (T, M)"""
        return _given(self.teacher, "teacher_TM", "teacher=True")

    @property
    def teacher_ref_TM(self) -> Tensor:
        """The log-probs of those tokens under the teacher's own reference. (T, M)"""
        return _given(self.teacher_ref, "teacher_ref_TM", "teacher_ref=True")

    @property
    def reward_GK(self) -> Tensor:
        """Scalar score of each response, higher is better; anything where there is no response. (G, K)"""
        return _given(self.reward, "reward_GK", "reward=True")

    @property
    def label_GK(self) -> Tensor:
        """+1 desirable, -1 undesirable, 0 unlabelled. (G, K)"""
        return _given(self.label, "label_GK", "label=True")

    @property
    def mismatch_G(self) -> Tensor:
        """log pi/ref of another row's response after this prompt, summed over its tokens; no gradient. (G,)"""
        return _given(self.mismatch, "mismatch_G", "mismatch=True")

    @property
    def row_G(self) -> Tensor:
        """Which row of the training data the group comes from, from 0; what per-row state is indexed by. (G,) int64"""
        return _given(self.row, "row_G", "row=True")

    @property
    def privileged_T(self) -> Tensor:
        """log pi of the same response tokens after the row's privileged prompt, with gradient. (T,)"""
        return _given(self.privileged, "privileged_T", "privileged=True")

    @property
    def correction_T(self) -> Tensor:
        """What a policy-gradient head multiplies each token's term with: the truncated weight of the sampler's own
        imprecision where a recipe asks for it, else 1; no gradient. (T,)"""
        return _given(self.correction, "correction_T", "correction=True")

    @property
    def share_done(self) -> Tensor:
        """How much of the run's optimizer steps are done, from 0 to below 1. A number without dimensions."""
        return _given(self.progress, "share_done", "progress=True")

    @property
    def embedding_GKE(self) -> Tensor:
        """The row's embedding of each response. (G, K, E)"""
        return _given(self.embedding, "embedding_GKE", "embedding=True")

    @property
    def prompt_embedding_GE(self) -> Tensor:
        """The row's embedding of its prompt. (G, E)"""
        return _given(self.prompt_embedding, "prompt_embedding_GE", "prompt_embedding=True")

    def column_G(self, name: str) -> Tensor:
        """A number that the row carries under this name. (G,)"""
        return _given(self.columns.get(name), f"column {name!r}", f'columns=("{name}",)')

    def response_column_GK(self, name: str) -> Tensor:
        """A number that each response carries under this name; anything where there is no response. (G, K)"""
        return _given(self.response_columns.get(name), f"column {name!r}", f'response_columns=("{name}",)')

    def token_column_T(self, name: str) -> Tensor:
        """A number that each response token carries under this name. (T,)"""
        return _given(self.token_columns.get(name), f"column {name!r}", f'token_columns=("{name}",)')

    def gate_T(self, name: str) -> Tensor:
        """What the head's own module (build) makes of the hidden state that predicts each token, with gradient. (T,)"""
        return _given(self.gates.get(name), f"gate {name!r}", "hidden=...")

    def old_gate_T(self, name: str) -> Tensor:
        """The same when y was sampled, no gradient; of rows from a file, as it is now. (T,)"""
        return _given(self.old_gates.get(name), f"gate {name!r} at sampling", "hidden=... and behaviour=True")

    @property
    def logratio_T(self) -> Tensor:
        """log pi(y_t) - log ref(y_t). (T,)"""
        return self.policy_T - self.ref_T

    @property
    def logratio_GK(self) -> Tensor:
        """log pi(y|x) - log ref(y|x), summed over the response's tokens. (G, K)"""
        return self.seg.sum(self.logratio_T)

    @property
    def best_GK(self) -> Tensor:
        """True at each group's best response: the first where they stand best first or have no rewards, else the one
        with the highest reward (the first among equals). Never one that is labelled undesirable. (G, K) bool"""
        by_reward = self.reward is not None and not self.best_first
        rank_GK = self.reward_GK if by_reward else self.seg.valid_GK.float()
        best_G = rank_GK.masked_fill(~self.seg.valid_GK, -torch.inf).argmax(-1)
        index_K = torch.arange(self.seg.valid_GK.shape[-1], device=best_G.device)
        best_GK = (index_K == best_G[:, None]) & self.seg.valid_GK
        return best_GK if self.label is None else best_GK & (self.label >= 0)


@dataclass(frozen=True)
class HeadOutput:
    """Un-reduced. The shape is the unit: (G,) group, (G, K) response, (T,) token. Only `objective` averages.

    Metrics are un-reduced likewise; they are averaged over the groups, responses or tokens of a log interval.
    state: what the head remembers for the next step, detached, under the names of Head.state.
    """

    loss: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    state: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Needs:
    """What a head must be fed; checked against the data before any model is loaded.

    layout: "pair" (two responses, best first), "set" (K >= 2 responses), "unpaired" (one labelled response), "labelled"
        (K >= 1 responses of a prompt with labels +1, -1 or 0: groups of good and bad ones, unlabelled ones) or "best"
        (the best response of a row; in a batch that another head lays out, the best of each group).
    unit: what the loss is averaged over. Every unit of the batch counts, or with layout "best" those of best_GK.
    """

    layout: Layout
    unit: Unit = "group"
    reference: bool = False
    reward: bool = False
    label: bool = False
    behaviour: bool = False  # old_T: log-probs under the policy that sampled
    correction: bool = False  # multiplies each token's term with correction_T
    token_kl: bool = False  # KL(ref || policy) per token; the reference cannot be a cache
    collision: bool = False  # log sum_v pi(v)^2 per token
    differs: bool = False  # which tokens of a pair were edited
    teacher: bool = False  # a teacher's log-probs of its likeliest tokens, stored with the rows
    teacher_ref: bool = False  # and those of the same tokens under the teacher's own reference
    embedding: bool = False
    prompt_embedding: bool = False
    mismatch: bool = False  # another row's response after this prompt
    row: bool = False  # the row's index, for per-row state
    privileged: bool = False  # the row's privileged prompt before the same responses
    progress: bool = False  # how much of the run is done
    columns: tuple[str, ...] = ()  # numbers that every row must carry
    response_columns: tuple[str, ...] = ()  # numbers that every response must carry
    token_columns: tuple[str, ...] = ()  # lists of numbers, one per token, that every response must carry
    group_size: int | None = None  # with layout "set": exactly so many responses
    samples_from: Literal["prompt", "privileged"] | None = None  # the only prompt that its samples may answer
    single: bool = False  # with layout "set": takes responses one by one, so that a row may have one alone
    hidden: Literal["policy", "ref"] | None = None  # fed to the module from build()
    raw_logps: bool = False  # with a reference: reads log pi other than through log pi/ref
    couples_batch: bool = False  # reads statistics across groups (KTO's KL, AOT's sort), or keeps state
    stops_gradient: bool = False  # treats something that depends on the policy as a constant

    @property
    def live_reference(self) -> bool:
        """Reads more of the reference than log-probs, so that it must be there at every step."""
        return self.token_kl or self.hidden == "ref"

    @property
    def any_reference(self) -> bool:
        """Reads the reference in some form."""
        return self.reference or self.mismatch or self.live_reference


class Head(ABC):
    """An objective. Fields are the hyperparameters, __call__ is the loss, needs says what it must be fed.

    A frozen dataclass that derives from Head directly; never subclass a head.
    """

    needs: ClassVar[Needs]

    @abstractmethod
    def __call__(self, x: HeadInput) -> HeadOutput:
        """Per-unit loss and per-unit metrics. Pure, no averaging, no host synchronisation."""

    def start(self, K: int) -> float | None:
        """The loss of a group of K responses where policy == reference, if it has one known value."""
        return None

    def state(self, rows: int) -> dict[str, Tensor]:
        """What the head remembers from step to step, as it is before the first one; kept in checkpoints. `rows`: how
        many rows the training data has. A head with state sets couples_batch: it is called once per optimizer step,
        on all groups of the step, finds the state in x.state and returns the next one in HeadOutput.state."""
        return {}

    def build(self, hidden_size: int, layers: int) -> nn.Module | None:
        """Trainable parameters, if any: a module from hidden states (T, L, D) of the embeddings and the L - 1 layers,
        at the positions that predict the response tokens, to {name: gate (T,)}. An optimizer group of its own."""
        return None
