"""Which heads the sandbox can feed, in which order people look for them, and how strong each is made."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from harness.derive import COLUMNS, kind_of_rows
from po.heads import HEADS
from po.types import Head

STRENGTHS = ("beta", "beta_pi", "tau")  # what a head may call the price of leaving the reference
# What belongs to the scale of the rewards, which lie between 0 and 1 here, and to the length of the answers.
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "infonca": {"alpha": 10},
    "nca": {"alpha": 10},
    "mpo_multi": {"alpha": 5},
    "exo_rw": {"beta_r": 0.1},
    "rpo_sft": {"eta": 0.2},  # beta times the answer's tokens, 12 here, takes the place of 300
}
SCALES = {"dro_v": 1.0}  # tau is in units of the reward
FAMILIES: Mapping[str, tuple[str, ...]] = {
    "Pairs: DPO and what its margin may be": (
        *("dpo", "ipo", "hinge", "sppo_hard", "exo_pref", "fdpo", "dpo_norm", "ld_dpo"),
    ),
    "Pairs: anchored, regularised": ("apo_zero", "apo_down", "dpop", "rpo_sft", "hybrid_dpo", "feasible_dpo", "bvpo"),
    "Pairs: noise, weights, other pairs": (
        *("rdpo", "cream", "wpo", "wpo_unaligned", "sem_dpo", "beta_dpo", "rpo_contrast", "rpo_diagonal"),
        *("aot", "aot_unpaired"),
    ),
    "Pairs: discovered losses": ("discopop", "dbaql", "aql", "aqfl", "padll", "cell", "pfl"),
    "Token level, distillation": ("tdpo1", "tdpo2", "sparsepo", "mapo", "bmc", "dckd", "adpa", "neg_distill", "gjsd"),
    "Without a reference": ("simpo", "alphapo", "orpo", "cpo", "slic", "tpo_triple", "tpo_l", "redi"),
    "Sets": (
        *("infonca", "nca", "mpo_multi", "ampo", "refa", "plackett_luce", "ranklist", "irpo_incontext", "exo_rw"),
    ),
    "Policy gradient, on stored answers": (
        *("grpo", "grpo_kl", "dapo", "dr_grpo", "gspo", "luspo", "cispo", "sapo", "vespo", "capo", "nft"),
        *("rloo", "rloo_ref_free", "reinforce_pp", "ppo", "copg"),
    ),
    "Scalar rewards": ("dro_v", "a_lol", "a_lol_seq", "a_lol_kl", "a_lol_ref_free"),
    "Labelled groups": ("mdpo_multisample", "mipo_multisample", "pmpo", "d2o", "hypo_kl", "selm", "spo_degree", "sspo"),
    "Labels on single answers": (
        *("kto", "bco", "bco_matched", "apo_zero_unpaired", "rpo_contrast_unpaired", "topr", "nat"),
    ),
    "Negatives": ("npo", "npo_nll", "npo_kl"),
    "Fine-tuning on the best": ("sft", "prob_sft", "prob_sft_threshold"),
}


def family(name: str) -> str:
    """Where a head is shown; heads that the list does not know go by their layout."""
    for title, names in FAMILIES.items():
        if name in names:
            return title
    return f"Others: {HEADS[name].needs.layout}"


def unfed(name: str) -> str | None:
    """Why the sandbox's rows cannot feed a head, or None."""
    needs = HEADS[name].needs
    if name == "grpo2":
        return "compares exactly two answers, and the sandbox's sets have more"
    if needs.privileged:
        return "no prompt of the sandbox knows more than another"
    columns = (*needs.columns, *needs.response_columns, *needs.token_columns)
    missing = [c for c in columns if c not in COLUMNS]
    return f"no way to derive its column {missing[0]!r} from scored answers" if missing else None


def strength(kind: type[Head]) -> str | None:
    """The field that says how much leaving the reference costs; None: the learning rate takes its place."""
    names = {f.name: f.default for f in fields(kind)}
    return next((n for n in STRENGTHS if n in names), None)


def scale(head: str, name: str) -> float:
    """What a strength is multiplied with: 1 where the default is DPO's 0.1 or less (small defaults are for answers of
    hundreds of tokens), else default / 0.1 (means over tokens, rewards of another scale)."""
    default = next(f.default for f in fields(HEADS[head]) if f.name == name)
    assert isinstance(default, float)
    return SCALES.get(head, max(1.0, default / 0.1))


@dataclass(frozen=True)
class Spec:
    """One run of the frontier."""

    head: str
    beta: float
    seed: int
    steps: int
    learning_rate: float

    def term(self) -> dict[str, Any]:
        """The head with its hyperparameters, as a recipe says it."""
        name = strength(HEADS[self.head])
        own = {} if name is None else {name: round(self.beta * scale(self.head, name), 6)}
        if self.head == "d2o":  # its second strength, of the bad answer, goes along
            own["alpha"] = own["beta"]
        return {"head": self.head, **OPTIONS.get(self.head, {}), **own}

    def rate(self) -> float:
        """The learning rate; without a strength it is what makes a run move further or less far."""
        return self.learning_rate if strength(HEADS[self.head]) else self.learning_rate * 0.1 / self.beta

    @property
    def kind(self) -> str:
        return kind_of_rows(self.head, HEADS[self.head].needs)

    @property
    def batch(self) -> int:
        """Eight questions a step, with all of their answers that the layout looks at."""
        return 32 if HEADS[self.head].needs.layout == "unpaired" else 8

    def key(self, world: str) -> str:
        """Of everything that decides the result, the head's own code included."""
        code = Path(inspect.getfile(HEADS[self.head])).read_bytes()
        parts = (world, self.term(), self.seed, self.steps, self.rate(), self.kind, self.batch)
        return hashlib.sha256(repr(parts).encode() + code).hexdigest()[:20]


def specs(heads: Sequence[str], betas: Sequence[float], seeds: Sequence[int], steps: int, rate: float) -> list[Spec]:
    """Seeds outermost, so that an interrupted benchmark has something of every head."""
    return [Spec(h, b, s, steps, rate) for s in seeds for h in heads for b in betas]
