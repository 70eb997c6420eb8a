"""Self-Distillation Fine-Tuning on sampled tokens: reverse KL to the same model after a prompt that shows more.

Paper: Shenfeld et al. 2026, Self-Distillation Enables Continual Learning, arXiv:2601.19897; with feedback in the
    prompt, Huebotter et al. 2026, Reinforcement Learning via Self-Distillation (SDPO), arXiv:2601.20802.

    loss = (1/|y|) sum_t sg(w_t (log pi(y_t | x) - log pi(y_t | z))) log pi(y_t | x),    w_t = min(pi/mu(y_t), clip)

Symbols: sg = no gradient; x the row's prompt, from which y is sampled; z its privileged prompt (a demonstration,
    feedback, a solution); mu the policy that sampled; clip: the largest importance weight.
Length: mean.
Bounded below: no; the printed loss is a surrogate. At samples of pi its gradient is that of KL(pi(. | x) || pi(. | z))
    at each position, with the teacher constant.
Pins the level: no.
Limits: x = z has no gradient. At pi = mu it is hindsight. Takes responses one by one: one sample of a prompt is enough.
Departures: as TRL 1.16's sdft and sdpo with `distillation_mode: sampled_token, distillation_alpha: 1.0`, which is not
    their default: their top-k divergences need both distributions, as gjsd does from stored ones. The teacher is the
    policy as it is now (`teacher_model_kind: live`); TRL's are the base model or a moving average by default.
Unverified: the papers' texts were not at hand.
Verified: closed form; TRL 1.16's functions are run on the same numbers in the test, where TRL is installed; a vector of
    an independent script.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Gt

from po.numeric import importance_ratio
from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class SDFT(Head):
    needs: ClassVar[Needs] = Needs(
        layout="set",
        unit="response",
        single=True,
        behaviour=True,
        correction=True,
        privileged=True,
        stops_gradient=True,
    )

    clip: Annotated[float, Gt(0)] = 2.0

    def __call__(self, x: HeadInput) -> HeadOutput:
        gap_T = (x.policy_T - x.privileged_T).detach()
        weight_T = importance_ratio(x.policy_T.detach(), x.old_T).clamp(max=self.clip)
        loss_T = x.correction_T * weight_T * gap_T * x.policy_T
        return HeadOutput(x.seg.mean(loss_T), {"sdft/kl": gap_T, "sdft/weight": weight_T})
