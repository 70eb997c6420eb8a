"""RL from text feedback, self-distillation: second-turn answers, written after a critique, teach the first turn.

Paper: Song et al. 2026, Expanding the Capabilities of Reinforcement Learning via Text Feedback, arXiv:2602.02482; its
    RLTF-SD.

    loss_i = -rl_coef A_i log pi(y1_i | x0),    A_i = r1_i - mean_i r0_i

Symbols: x0 the first-turn prompt, the row's; y1_i the answer that was given in the second turn, after a critique of the
    first answer, with its reward r1_i; r0_i the first answer's reward, in the response's column `first_reward`; rl_coef
    scales the advantage, as the recipe's `weight` does; min_prob: tokens that pi gives less probability have no loss.
Length: sum.
Bounded below: no; answers worse than the mean first answer fall for ever.
Pins the level: yes where second answers are better than the first ones: they are learnt by weighted likelihood.
Limits: r0_i all equal to r1_i's mean is REINFORCE with the group's mean; all r1 = r0 equal has no gradient. Samples are
    of another prompt and there is no importance weight, so a constant added to the r0 changes the expected gradient. A
    row holds all second answers of its prompt; where a length policy drops some, their r0 leave the mean too.
Departures: the authors' code multiplies A by 0.1 (with DAPO it grows to that from 0), and masks tokens below a
    log-prob of -5: rl_coef 0.1, min_prob 0.00674. The multi-turn RL that the paper trains beside it is another run.
    The other half of the paper, RLTF-FM, is plain likelihood of critiques: head sft on rows whose prompt shows the
    first answer and whose response is the critique (recipes/sft-critiques-llama-3.1-8b.yaml). It cannot be a second
    term here, since a term `sft` would read the second answers.
Unverified: the paper's text was not at hand; formula from notes, options from notes on the authors' code.
Verified: closed form of every option; a vector of an independent script. No public code was run.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Lt

from po.numeric import masked_mean
from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class RLTFSD(Head):
    needs: ClassVar[Needs] = Needs(layout="set", unit="response", reward=True, response_columns=("first_reward",))

    rl_coef: Annotated[float, Gt(0)] = 1.0
    min_prob: Annotated[float, Ge(0), Lt(1)] = 0.0

    def __call__(self, x: HeadInput) -> HeadOutput:
        valid_GK = x.seg.valid_GK
        first_G = masked_mean(x.response_column_GK("first_reward"), valid_GK)
        A_GK = self.rl_coef * torch.where(valid_GK, x.reward_GK - first_G[:, None], 0)
        least = math.log(self.min_prob) if self.min_prob else -math.inf
        kept_T = x.policy_T >= least
        loss_GK = -A_GK * x.seg.sum(torch.where(kept_T, x.policy_T, 0))
        return HeadOutput(loss_GK, {"rltf_sd/advantage": A_GK, "rltf_sd/kept": kept_T.to(x.policy_T.dtype)})
