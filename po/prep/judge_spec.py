"""What can be said of a judge, and the requests that it is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge

from po.errors import UserError
from po.prep.prompts import Prompt, replaced

Pairs = Literal["all", "best_vs_rest"]


@dataclass(frozen=True)
class JudgeSpec:
    """One judge among the scorers. Fields without a model, url and key_env of their own: the command line's."""

    judge: Literal["pointwise", "pairwise"]
    name: str | None = None  # None: pointwise or pairwise
    weight: float = 1.0
    model: str | None = None
    url: str | None = None
    key_env: str | None = None
    prompt: str | None = None  # a file with a text in the place of po's
    scale: tuple[float, float] = (1, 10)  # pointwise
    pairs: Pairs = "all"  # pairwise
    best_by: str | None = None  # with best_vs_rest: the scorer, or `given`, that says which answer is the best
    temperature: Annotated[float, Ge(0)] = 0.0
    max_tokens: Annotated[int, Ge(1)] = 1024
    seed: int = 0
    retries_unparsed: Annotated[int, Ge(0)] = 2
    retry_temperature: Annotated[float, Ge(0)] = 0.7  # at least this where a verdict is asked for again


POINTWISE = """Rate how well an answer serves the request that it replies to. Consider whether it does what was asked,
whether what it says is true, whether it is honest about what it does not know, whether anything that matters is
missing, and whether it is clear. Neither length nor a confident tone is a merit in itself.

<request>
{prompt}
</request>

<answer>
{response}
</answer>

Say briefly what is good and what is lacking. Then end with a line that holds the score and nothing else, a number
from LOW (useless) to HIGH (could not be better):
Score: N"""

PAIRWISE = """Two answers to one request follow. Decide which serves it better. Consider whether an answer does what was
asked, whether what it says is true, whether it is honest about what it does not know, whether anything that matters
is missing, and whether it is clear. Neither length, nor a confident tone, nor the place in which an answer stands
here is a merit in itself.

<request>
{prompt}
</request>

<answer_a>
{response_a}
</answer_a>

<answer_b>
{response_b}
</answer_b>

Say briefly what speaks for each. Then end with a line that holds the verdict and nothing else: A, B, or tie where
neither is better:
Verdict: A"""


def prompt_of(spec: JudgeSpec) -> Prompt:
    """The judge's request: po's, or that of its file."""
    low, high = (f"{end:g}" for end in spec.scale)
    own = {
        "pointwise": Prompt("pointwise", 1, POINTWISE.replace("LOW", low).replace("HIGH", high), "Score:"),
        "pairwise": Prompt("pairwise", 1, PAIRWISE, "Verdict:"),
    }[spec.judge]
    return replaced([own], [] if spec.prompt is None else [f"{own.id}={spec.prompt}"])[own.id]


def check(spec: JudgeSpec, place: str) -> None:
    """Raises UserError for what does not go together."""
    plain, pointwise = JudgeSpec(spec.judge), spec.judge == "pointwise"
    for name in ("pairs", "best_by") if pointwise else ("scale",):
        if getattr(spec, name) != getattr(plain, name):
            raise UserError(f"{place}.{name}: a {spec.judge} judge does not read it; leave it out")
    if spec.scale[0] >= spec.scale[1]:
        raise UserError(f"{place}.scale: expected the lowest and the highest score, got {list(spec.scale)}")
    if (spec.pairs == "best_vs_rest") != (spec.best_by is not None):
        raise UserError(f"{place}: `pairs: best_vs_rest` and `best_by: NAME` go together; give both or neither")
