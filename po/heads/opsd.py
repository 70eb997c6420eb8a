"""On-Policy Self-Distillation (OPSD): policy gradient, held to what the model says with privileged information.

Paper: Penaloza et al. 2026, Privileged Information Distillation for Language Models, arXiv:2602.04942.

    loss = -min(r A, clip(r, 1 - e, 1 + e) A) + beta mean_t sg(log pi_S - log pi_T)(y_t) log pi_S(y_t)
    A = (R - mean(R)) / std(R) over the responses of the prompt,    r = pi_S(y) / mu(y) of the whole response

Symbols: sg = no gradient; pi_S the student, the row's prompt, from which responses are sampled; pi_T the same weights
    after the row's privileged prompt; mu the student when it sampled; beta: of KL(pi_S || sg pi_T); e = epsilon; scale:
    the standard deviation divides by n - 1 (unbiased), by n (population), or A is R - mean(R) (none). The metric
    opsd/kl is the estimate of that KL, per token.
Length: sum in the ratio; the KL is a mean.
Bounded below: no.
Pins the level: no.
Limits: beta = 0 is GRPO with a ratio of whole responses, without teacher; equal rewards leave the KL alone, which is
    sdft's loss at pi = mu.
Departures: the KL's gradient is the score-function one, position by position, and has no weight for reused samples.
    Zhao et al. 2026 use the name OPSD for distillation without rewards.
Unverified: clip and its width (the notes say GRPO), the KL as a mean over tokens, the estimator of std; the paper's
    text was not at hand and its code is a placeholder. Formula from notes.
Verified: closed form of every option. No public code to run.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Le

from po.numeric import clipped_surrogate, group_advantages, importance_ratio
from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class OPSD(Head):
    needs: ClassVar[Needs] = Needs(
        layout="set",
        unit="response",
        reward=True,
        behaviour=True,
        correction=True,
        privileged=True,
        samples_from="prompt",
        stops_gradient=True,
    )

    beta: Annotated[float, Ge(0)] = 0.1
    epsilon: Annotated[float, Gt(0), Le(1)] = 0.2
    scale: Literal["population", "unbiased", "none"] = "unbiased"

    def __call__(self, x: HeadInput) -> HeadOutput:
        A_GK = group_advantages(x.reward_GK, x.seg.valid_GK, self.scale)
        ratio_GK = importance_ratio(x.seg.sum(x.policy_T), x.seg.sum(x.old_T))
        gain_GK = clipped_surrogate(ratio_GK, A_GK, self.epsilon, self.epsilon)
        gap_T = (x.policy_T - x.privileged_T).detach()
        loss_T = x.correction_T * (x.seg.spread(gain_GK) + self.beta * gap_T * x.policy_T)
        return HeadOutput(x.seg.mean(loss_T), {"opsd/kl": gap_T, "opsd/ratio": ratio_GK.detach()})
