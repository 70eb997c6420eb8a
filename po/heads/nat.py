"""Negative-Aware Training (NAT): likelihood of good and bad trajectories, told apart by their prompts.

Paper: Wang et al. 2024, Learning From Failure: Integrating Negative Examples when Fine-tuning Large Language Models as
    Agents, arXiv:2402.11651.

    loss_t = -c log pi(y_t | x, y_<t),    c = 1 where the response is labelled +1, negative_weight where -1

Symbols: the prompt x of a negative row asks for a wrong solution, that of a positive row for a right one (the data says
    so; only the latter is used for inference); negative_weight is what a token of a negative trajectory counts.
Length: mean over the tokens of the optimizer step.
Bounded below: yes, by 0.
Pins the level: yes; it raises the likelihood of every response after its own prompt.
Limits: negative_weight 1 is SFT on all rows; 0 is SFT on the positive ones, averaged over all tokens. Without different
    prompts this trains the model on wrong answers.
Departures: the paper weighs both classes alike and chooses how many negatives there are; negative_weight is ours, with
    the paper's default of 1. The prompts are the data's: po adds nothing to them. TRL and HALOs have none.
Verified: closed form; the authors' code was read: it is ordinary NLL on rows with two kinds of prompt.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge

from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class NAT(Head):
    needs: ClassVar[Needs] = Needs(layout="unpaired", unit="token", label=True)

    negative_weight: Annotated[float, Ge(0)] = 1.0

    def __call__(self, x: HeadInput) -> HeadOutput:
        negative_T = x.seg.spread(x.label_GK) < 0
        loss_T = -x.policy_T * torch.where(negative_T, self.negative_weight, 1.0).to(x.policy_T.dtype)
        return HeadOutput(loss_T, {"nat/negative_tokens": negative_T.to(loss_T.dtype)})
