"""Supervised fine-tuning: the negative log-likelihood of the best response, alone or as a term beside another head.

Paper: none; maximum likelihood. As a second term of a preference loss: Liu et al. 2024, arXiv:2405.16436.

    loss_t = -log pi(y_t | x, y_<t)    for the tokens of the best response

Symbols: y the response with the highest reward, or the first where there are no rewards (pairs are stored best first).
Length: mean over the tokens of the optimizer step.
Bounded below: yes, by 0.
Pins the level: yes; it raises the likelihood of the best response.
Limits: on rows with one response, this is ordinary SFT. The weight of the term is the recipe's `weight`.
Departures: as TRL 1.16 `sft`, but exact under gradient accumulation, where TRL averages the means of its micro-batches.
    Liu et al. sum over the response instead of averaging over tokens.
Verified: closed form, by hand.
"""

from dataclasses import dataclass
from typing import ClassVar

from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class SFT(Head):
    needs: ClassVar[Needs] = Needs(layout="best", unit="token")

    def __call__(self, x: HeadInput) -> HeadOutput:
        """-log pi for every token (T,); `objective` counts the best response's alone."""
        return HeadOutput(-x.policy_T)
