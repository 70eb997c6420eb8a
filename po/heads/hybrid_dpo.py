"""Hybrid-DPO (the paper's HyPO): where the reference prefers the worse response, the reference is taken as neutral.

Paper: Yuan et al. 2026, Mitigating Mismatch within Reference-based Preference Optimization, arXiv:2602.11902.

    loss = -log s(b [D(pi) - max(0, D(ref))]),    D(p) = log p(y_w) - log p(y_l)

Symbols: s = sigmoid; b = beta; y_w the better response, y_l the worse. The metric hybrid_dpo/clipped is 1 where D(ref)
    < 0.
Length: sum.
Bounded below: yes, by 0.
Pins the level: no.
Limits: DPO where D(ref) >= 0; CPO's contrast, without reference, where D(ref) < 0, so that a pair which the reference
    has wrong is not done before the policy has it right. At policy == reference the loss is -log s(b min(0, D)).
Departures: none known; no public code. Another "HyPO", DPO with an online KL term, is arXiv:2406.01462.
Unverified: the default beta, which is DPO's; only the abstract was read, which states the formula.
Verified: closed form; identities with DPO and with the reference-free contrast.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Gt
from torch.nn.functional import logsigmoid

from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class HybridDPO(Head):
    needs: ClassVar[Needs] = Needs(layout="pair", reference=True, raw_logps=True)

    beta: Annotated[float, Gt(0)] = 0.1

    def __call__(self, x: HeadInput) -> HeadOutput:
        chosen_G, rejected_G = x.logratio_GK.unbind(-1)
        ref_chosen_G, ref_rejected_G = x.seg.sum(x.ref_T).unbind(-1)
        ref_margin_G = ref_chosen_G - ref_rejected_G
        margin_G = chosen_G - rejected_G + ref_margin_G.clamp(max=0)  # D(pi) - D(ref) + min(0, D(ref))
        clipped_G = (ref_margin_G < 0).to(margin_G.dtype)
        return HeadOutput(-logsigmoid(self.beta * margin_G), {"hybrid_dpo/clipped": clipped_G})
