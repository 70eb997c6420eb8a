"""Hindsight self-distillation on fresh samples: the change that the user's reply makes is each token's advantage.

Paper: Kleine Buening et al. 2026, Aligning Language Models from User Interactions, arXiv:2603.12273; its online loss.

    loss = (1/|y|) sum_t -min(r_t A_t, clip(r_t, 1 - e, 1 + e) A_t),    r_t = pi/mu(y_t | x, y_<t)
    A_t = sg(d_t) - mean_t sg(d_t),    d_t = log pi(y_t | x, o, y_<t) - log pi(y_t | x, y_<t)

Symbols: sg = no gradient; mu the policy that sampled y; o the user's next message; the row's prompt is x, its
    privileged prompt x with o; e = epsilon. The metric hindsight_online/signal is d_t, its mean over a response the
    reward-like number that the authors log.
Length: mean.
Bounded below: no; the clip ends the gradient, not the fall.
Pins the level: no; the advantages of a response add up to 0.
Limits: at pi = mu the gradient is that of hindsight with center. One-token responses, and those without o, have
    advantage 0. One response a row, the one that o answers, with the sampler's log-probs.
Departures: d_t is made at each step; the authors make it once, when they sample: the same on the first step after it.
    Their trainer also makes a signal of the whole response, less a KL and a leave-one-out baseline, and logs it as
    advantages; their loss never reads it, and centring would cancel it. Their optional KL to a reference is not here.
Unverified: the paper's text was not at hand; the formula is of the authors' code, the clip 0.2 is PPO's.
Verified: closed form; a vector of an independent script (at pi = mu). The authors' code was not run.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Gt, Le

from po.numeric import clip_ended, clipped_surrogate, importance_ratio
from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class HindsightOnline(Head):
    needs: ClassVar[Needs] = Needs(
        layout="best", unit="response", behaviour=True, correction=True, privileged=True, stops_gradient=True
    )

    epsilon: Annotated[float, Gt(0), Le(1)] = 0.2

    def __call__(self, x: HeadInput) -> HeadOutput:
        signal_T = (x.privileged_T - x.policy_T).detach()
        A_T = signal_T - x.seg.spread(x.seg.mean(signal_T))
        ratio_T = importance_ratio(x.policy_T, x.old_T)
        loss_T = x.correction_T * clipped_surrogate(ratio_T, A_T, self.epsilon, self.epsilon)
        low_T, high_T = clip_ended(ratio_T, A_T, self.epsilon, self.epsilon)
        metrics = {"hindsight_online/signal": signal_T, "hindsight_online/clip": low_T + high_T}
        return HeadOutput(x.seg.mean(loss_T), metrics)
