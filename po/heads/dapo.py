"""DAPO's loss: GRPO with a higher upper clip, and every token of the step counts equally.

Paper: Yu et al. 2025, DAPO: An Open-Source LLM Reinforcement Learning System at Scale, arXiv:2503.14476.

    loss = -min(r_t A, clip(r_t, 1 - e_low, 1 + e_high) A),    averaged over tokens
    r_t = min(pi/mu(y_t | x, y_<t), delta),    A = (R - mean(R)) / (std(R) + eps), over the responses of the prompt

Symbols: mu the policy that sampled; e_low = epsilon_low and e_high = epsilon_high, the clip; delta the largest ratio
    that counts, which matters where A < 0 (1e9, above every ratio: no such bound); scale: the standard deviation
    divides by n (population), by n - 1 (unbiased), or A is R - mean(R) (none); eps beside it.
Length: sum, over the tokens of the whole step: long responses weigh more than in grpo.
Bounded below: no; the clip ends the gradient, not the fall.
Pins the level: no.
Limits: with responses of equal length it is grpo. At pi = mu the gradient is that of REINFORCE with the group's mean as
    the baseline. Groups whose rewards are equal have loss 0, and their tokens count; dapo/zero_std is their share.
    dapo/clip_low and dapo/clip_high are the shares of tokens whose gradient the clip has ended at A < 0 and at A > 0.
Departures: the paper prints the average over the tokens of a prompt's group; here it is over all tokens of the step,
    over micro-batches and ranks, as in verl's `token-mean` and TRL's `dapo`. TRL's `bnpo` is the same average over one
    micro-batch alone, and the same number where that is the whole step, which is why it is no head of its own. Sampling
    until rewards differ (dynamic sampling) is rollout.zero_variance, and the overlong penalty is a reward. The paper
    leaves the estimator of std open: unbiased as in TRL (eps 1e-4) and verl (1e-6). delta: see grpo.
Unverified: the paper's text was not at hand; 0.2 and 0.28 are confirmed by TRL's and verl's settings for it.
Verified: closed form of every option; vectors of an independent script on which the executed code of TRL 1.16 (loss and
    gradient) and verl (dual clip) agrees; any cut into micro-batches gives the same gradient.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Le

from po.numeric import clip_ended, clipped_surrogate, group_advantages, importance_ratio
from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class DAPO(Head):
    needs: ClassVar[Needs] = Needs(layout="set", unit="token", reward=True, behaviour=True, correction=True)

    epsilon_low: Annotated[float, Gt(0), Le(1)] = 0.2
    epsilon_high: Annotated[float, Gt(0)] = 0.28
    delta: Annotated[float, Gt(1)] = 1e9
    scale: Literal["population", "unbiased", "none"] = "unbiased"
    eps: Annotated[float, Ge(0)] = 0.0

    def __call__(self, x: HeadInput) -> HeadOutput:
        A_GK = group_advantages(x.reward_GK, x.seg.valid_GK, self.scale, self.eps)
        A_T = x.seg.spread(A_GK)
        ratio_T = importance_ratio(x.policy_T, x.old_T).clamp(max=self.delta)
        loss_T = x.correction_T * clipped_surrogate(ratio_T, A_T, self.epsilon_low, self.epsilon_high)
        low_T, high_T = clip_ended(ratio_T, A_T, self.epsilon_low, self.epsilon_high)
        metrics = {
            "dapo/ratio": ratio_T.detach(),
            "dapo/clip_low": low_T,
            "dapo/clip_high": high_T,
            "dapo/zero_std": (A_GK == 0).all(-1).to(ratio_T.dtype),
        }
        return HeadOutput(loss_T, metrics)
