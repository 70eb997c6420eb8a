"""CAPO: GRPO that learns from good samples alone at first, and from all of them later.

Paper: Yang et al. 2025, From Imitation to Discrimination: Toward A Generalized Curriculum Advantage Mechanism Enhancing
    Cross-Domain Reasoning Tasks, arXiv:2512.02580.

    loss = mean_t -m min(rho_t A, clip(rho_t, 1 - el, 1 + eh) A),    rho_t = pi(y_t) / mu(y_t)
    m = [A >= 0] while the share of the run that is done is below p, then 1

Symbols: p = phase, the share of the optimizer steps of the first phase; el, eh = epsilon_low, epsilon_high; mu the
    policy that sampled; A = (r - mean r) / (std r + eps) over the responses of the prompt; scale: std divides by n
    (population), by n - 1 (unbiased), or A is r - mean r (none).
Length: mean over tokens.
Bounded below: where A > 0, by -(1 + eh) A; where A < 0, by 0.
Pins the level: no.
Limits: phase = 0: GRPO throughout; phase = 1: only good samples. The switch is hard: the optimizer's second moments are
    those of the smaller gradients of the first phase, so expect a jump of the update there. Entropy falls in the first
    phase.
Departures: GRPO without a KL term is the only host; the paper has others and keeps the host's KL term. eps is 1e-4
    in TRL and 1e-6 in verl.
Unverified: read in a summary only. Left-out responses keep their place in the average of the first phase, which is our
    reading; averaging over the good ones would make that phase's steps larger. Sources say 20 to 30 % of the steps, and
    10 to 20 %.
Verified: closed form; a vector of an independent script (no public code is known).
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Le

from po.numeric import clip_ended, clipped_surrogate, group_advantages, importance_ratio
from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class CAPO(Head):
    needs: ClassVar[Needs] = Needs(
        layout="set", unit="response", reward=True, behaviour=True, correction=True, progress=True
    )

    phase: Annotated[float, Ge(0), Le(1)] = 0.2
    epsilon_low: Annotated[float, Gt(0), Le(1)] = 0.2
    epsilon_high: Annotated[float, Gt(0)] = 0.2
    scale: Literal["population", "unbiased", "none"] = "unbiased"
    eps: Annotated[float, Ge(0)] = 0.0

    def __call__(self, x: HeadInput) -> HeadOutput:
        advantage_GK = group_advantages(x.reward_GK, x.seg.valid_GK, self.scale, self.eps)
        kept_GK = ((advantage_GK >= 0) | (x.share_done >= self.phase)).to(advantage_GK.dtype)
        ratio_T = importance_ratio(x.policy_T, x.old_T)
        advantage_T = x.seg.spread(advantage_GK)
        loss_T = clipped_surrogate(ratio_T, advantage_T, self.epsilon_low, self.epsilon_high)
        low_T, high_T = clip_ended(ratio_T, advantage_T, self.epsilon_low, self.epsilon_high)
        metrics = {
            "capo/kept": kept_GK,
            "capo/ratio": ratio_T.detach(),
            "capo/clip_low": low_T,
            "capo/clip_high": high_T,
            "capo/zero_std": (advantage_GK == 0).all(-1).to(ratio_T.dtype),
        }
        return HeadOutput(kept_GK * x.seg.mean(loss_T * x.correction_T), metrics)
