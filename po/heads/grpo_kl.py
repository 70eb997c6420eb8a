"""GRPO with its KL term: clipped policy gradient against the group's mean, held to a reference token by token.

Paper: Shao et al. 2024, DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models,
    arXiv:2402.03300.

    loss = (1/|y|) sum_t [-min(r_t A, clip(r_t, 1 - e_low, 1 + e_high) A) + b k3_t]
    r_t = min(pi/mu(y_t | x, y_<t), delta),    k3_t = ref/pi(y_t | x, y_<t) - log ref/pi(y_t | x, y_<t) - 1
    A = (R - mean(R)) / (std(R) + eps), over the responses of the prompt

Symbols: mu the policy that sampled; b = beta; e_low = epsilon_low and e_high = epsilon_high, the clip; delta the
    largest ratio that counts, which matters where A < 0 (1e9, above every ratio: no such bound); scale: the standard
    deviation divides by n (population), by n - 1 (unbiased), or A is R - mean(R) (none); eps beside it.
Length: mean.
Bounded below: no; the clip ends the gradient, not the fall.
Pins the level: yes, to the reference's, token by token.
Limits: at pi = ref the KL term and its gradient are 0, and what remains is grpo. k3 is an unbiased estimate of the KL's
    value for samples of pi; its gradient, b (1 - ref/pi), is not that of KL(pi || ref). Groups whose rewards are equal
    have only the KL term. grpo_kl/kl is the mean of k3 over tokens; the other metrics are those of grpo.
Departures: as grpo. b is 0 by default in TRL and 0.001 in DeepSeek-R1's training. The correction for the sampler's
    imprecision is on the first term alone, as in TRL; TRL's `use_bias_correction_kl` (k3 times r_t, of DeepSeek-V3.2)
    has no counterpart.
Unverified: b = 0.04 could not be checked against the paper; the clip 0.2 is PPO's, the paper prints none.
Verified: closed form of every option; a vector of an independent script on which the executed code of TRL 1.16 (loss
    and gradient) agrees; identity with grpo at pi = ref.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Le

from po.numeric import clip_ended, clipped_surrogate, group_advantages, importance_ratio, k3
from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class GRPOKL(Head):
    needs: ClassVar[Needs] = Needs(
        layout="set",
        unit="response",
        reference=True,
        reward=True,
        behaviour=True,
        correction=True,
        raw_logps=True,
    )

    beta: Annotated[float, Gt(0)] = 0.04
    epsilon_low: Annotated[float, Gt(0), Le(1)] = 0.2
    epsilon_high: Annotated[float, Gt(0)] = 0.2
    delta: Annotated[float, Gt(1)] = 1e9
    scale: Literal["population", "unbiased", "none"] = "unbiased"
    eps: Annotated[float, Ge(0)] = 0.0

    def __call__(self, x: HeadInput) -> HeadOutput:
        A_GK = group_advantages(x.reward_GK, x.seg.valid_GK, self.scale, self.eps)
        A_T = x.seg.spread(A_GK)
        ratio_T = importance_ratio(x.policy_T, x.old_T).clamp(max=self.delta)
        loss_T = x.correction_T * clipped_surrogate(ratio_T, A_T, self.epsilon_low, self.epsilon_high)
        kl_T = k3(x.policy_T, x.ref_T)
        low_T, high_T = clip_ended(ratio_T, A_T, self.epsilon_low, self.epsilon_high)
        metrics = {
            "grpo_kl/kl": kl_T.detach(),
            "grpo_kl/ratio": ratio_T.detach(),
            "grpo_kl/clip_low": low_T,
            "grpo_kl/clip_high": high_T,
            "grpo_kl/zero_std": (A_GK == 0).all(-1).to(ratio_T.dtype),
        }
        return HeadOutput(x.seg.mean(loss_T + self.beta * kl_T), metrics)
