"""What a reward model's recipe says, as frozen dataclasses. Sections that policies have too are those of po.spec."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt

from po.spec import DataSpec, LoraSpec, ModelSpec, Recipe

TEMPLATE = (
    "Rate the answer that ends this conversation from 1 (worst) to 9 (best). Write the rating alone.\n\n"
    "Conversation:\n{prompt}\n\nAnswer:\n{completion}\n\nRating:\n"
)


@dataclass(frozen=True)
class BradleyTerry:
    """A sequence classification model with one score; po.reward_model.losses has the equations."""

    center: Annotated[float, Ge(0)] = 0.01  # weight of (r_chosen + r_rejected)^2, which holds the scores around 0
    margin: Literal["none", "margin", "strength"] = "none"  # the rows' column that the difference must exceed
    label_smoothing: Annotated[float, Ge(0), Lt(0.5)] = 0.0  # share of the labels taken to be wrong
    soft_labels: bool = False  # the rows' column `preference`, P(chosen is better), where a row has it
    contrastive: Annotated[float, Ge(0)] = 0.0  # weight of the contrastive term on last-token features
    temperature: Annotated[float, Gt(0)] = 0.05  # of the contrastive term
    features: Literal["answers", "difference"] = "answers"  # what it tells apart: the answers, or chosen - rejected
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0  # in the model; what makes the contrastive term's two passes differ


@dataclass(frozen=True)
class Ordinal:
    """A language model that rates: OPRM. The loss is -log P(the chosen answer is rated higher)."""

    template: str = TEMPLATE  # the question, with {prompt} and {completion}; a user message where there is a template
    ratings: tuple[str, ...] = tuple("123456789")  # worst first; each must be one token
    quality: Literal["none", "region", "triangle"] = "none"  # how the rows' `quality` of answers restricts the ratings
    levels: Annotated[int, Ge(2)] = 3  # of quality, 1 the worst: bad, normal, good


OBJECTIVES: dict[str, type[BradleyTerry] | type[Ordinal]] = {"bradley_terry": BradleyTerry, "ordinal": Ordinal}
Objective = BradleyTerry | Ordinal


@dataclass(frozen=True)
class Ensemble:
    """What `po reward strength` trains: members x folds models, each on all folds but one."""

    folds: Annotated[int, Ge(2)] = 5
    members: Annotated[int, Ge(1)] = 2  # each with folds, initial score and order of rows of its own


@dataclass(frozen=True)
class RewardRecipe:
    model: ModelSpec
    data: DataSpec
    objective: Objective
    output_dir: str
    lora: LoraSpec | None = None
    ensemble: Ensemble = Ensemble()  # read by `po reward strength` alone
    train: Mapping[str, Any] = field(default_factory=dict)  # transformers.TrainingArguments by name, checked
    deepspeed: str | Mapping[str, Any] | None = None  # zero0|1|2|3, zero2_offload, zero3_offload, a path, a mapping
    resume: bool = False
    seed: Annotated[int, Ge(0), Lt(2**32)] = 42

    @property
    def plain(self) -> Recipe:
        """The part that any training has, for what is written for policies: a recipe without heads."""
        shared = ("model", "data", "output_dir", "lora", "train", "deepspeed", "resume", "seed")
        return Recipe(loss=(), **{name: getattr(self, name) for name in shared})

    @property
    def kind(self) -> str:
        """What the recipe calls the objective."""
        return next(name for name, cls in OBJECTIVES.items() if isinstance(self.objective, cls))
