"""Sem-DPO: DPO that weighs a pair less the further the better response is in meaning from its prompt.

Paper: Mohamed et al. 2025, Sem-DPO: Mitigating Semantic Inconsistency in Preference Optimization for Prompt
    Engineering, arXiv:2507.20133.

    loss = -w log s(b h),    w = exp(-a d),    d = 1 - cos(e(x), e(y_w)),    h = log pi/ref(y_w) - log pi/ref(y_l)

Symbols: s = sigmoid; b = beta; a = alpha; e(x) the row's embedding of its prompt and e(y_w) that of the better
    response, by the same embedder; d from 0 to 2; y_w the better response (there: a rewritten text-to-image prompt),
    y_l the worse. Metrics: sem_dpo/distance is d, sem_dpo/weight is w.
Length: sum.
Bounded below: yes, by 0.
Pins the level: no.
Limits: alpha = 0 is DPO. An embedding of zeros has cosine 0.
Departures: w multiplies the loss and is not normalised: the mean is over pairs. TRL and HALOs have none.
Unverified: alpha, which the abstract does not give, and that w is not normalised; only the abstract was read.
Verified: closed form; a vector without public counterpart; identity with DPO.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge, Gt
from torch.nn.functional import cosine_similarity, logsigmoid

from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class SemDPO(Head):
    needs: ClassVar[Needs] = Needs(layout="pair", reference=True, embedding=True, prompt_embedding=True)

    beta: Annotated[float, Gt(0)] = 0.1
    alpha: Annotated[float, Ge(0)] = 1.0

    def __call__(self, x: HeadInput) -> HeadOutput:
        chosen_G, rejected_G = x.logratio_GK.unbind(-1)
        distance_G = 1 - cosine_similarity(x.prompt_embedding_GE, x.embedding_GKE[:, 0], dim=-1)
        weight_G = (-self.alpha * distance_G).exp()
        loss_G = -weight_G * logsigmoid(self.beta * (chosen_G - rejected_G))
        return HeadOutput(loss_G, {"sem_dpo/distance": distance_G, "sem_dpo/weight": weight_G})
