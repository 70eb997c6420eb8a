"""Contrastive Policy Gradient (CoPG): policy gradient on scored responses of any origin, as a supervised loss.

Paper: Flet-Berliac et al. 2024, Contrastive Policy Gradient: Aligning LLMs on sequence-level scores in a
    supervised-friendly fashion, arXiv:2406.19185.

    loss = -(dR D - (b/2) D^2),    averaged over the unordered pairs of a group
    dR = R(y) - R(y'),    D = d(y) - d(y'),    d(y) = log pi/ref(y)

Symbols: b = beta, in units of the reward per nat; R the response's reward; y, y' two responses of one prompt.
Length: sum.
Bounded below: yes, by -dR^2 / (2 b) in each pair, so the loss is routinely negative; copg/residual, the mean of
    (dR - b D)^2, falls to 0 and is the curve to watch.
Pins the level: no; only differences of log-ratios within a group enter.
Limits: the gradient is -(dR - b D) (grad log pi(y) - grad log pi(y')): b/2 in the loss is b in the gradient. It is 0 in
    every single pair at pi = ref exp(R / b) / Z, whoever wrote the responses. Responses that no group holds keep their
    logits. d grows with length, and with it the b D beside dR: copg/pull is b^2 D^2 and copg/spread is dR^2, the means.
    Small b can lose reward of generations while the loss falls. Equal responses and groups of one have loss 0.
Departures: two responses are the paper's case. More are the mean over pairs: -(2/K) sum_i (A_i) grad log pi(y_i), with
    A_i the reward R - b d, detached, minus the mean of the others'. The form -A_i log pi(y_i), averaged over responses,
    is RLOO on that reward and has half this gradient: weight 0.5. Samples need no log-probs of who wrote them, no ratio
    and no clipping, hence no correction either. TRL, verl and OpenRLHF have none.
Unverified: K > 2, which the paper leaves open; that Command A's training took it so is from notes.
Verified: closed form for 2 and more responses; vectors of an independent script (no code of the authors is public);
    identities with IPO and the leave-one-out policy gradient; zero gradient of every pair at the optimum.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Gt

from po.numeric import masked_center, masked_var
from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class CoPG(Head):
    needs: ClassVar[Needs] = Needs(layout="set", reference=True, reward=True)

    beta: Annotated[float, Gt(0)] = 0.06

    def __call__(self, x: HeadInput) -> HeadOutput:
        valid_GK = x.seg.valid_GK
        d_GK = masked_center(x.logratio_GK, valid_GK)  # the mean over pairs of D^2 is twice the unbiased variance
        R_GK = masked_center(x.reward_GK, valid_GK)
        gain_GK = d_GK * (R_GK - self.beta / 2 * d_GK)
        pull_GK = self.beta * d_GK.detach()
        metrics = {
            "copg/residual": 2 * masked_var(R_GK - pull_GK, valid_GK),
            "copg/pull": 2 * masked_var(pull_GK, valid_GK),
            "copg/spread": 2 * masked_var(R_GK, valid_GK),
        }
        return HeadOutput(-2 * gain_GK.sum(-1) / (valid_GK.sum(-1) - 1).clamp(min=1), metrics)

    def start(self, K: int) -> float:
        return 0.0
