"""Multi-sample IPO (mIPO): regress the difference of two groups' mean log-ratios, without the bias of a finite group.

Paper: Wang et al. 2024, Preference Optimization with Multi-Sample Comparisons, arXiv:2410.12138.

    loss = (m_W - m_L - 1 / (2 t))^2  -  v_W / |W|  -  v_L / |L|        the last two terms with unbiased
    m = mean u,    v = sample variance of u (divided by n - 1),    u_k = log pi/ref(y_k)

Symbols: t = tau; W the responses labelled +1, L those labelled -1; unbiased: takes off what the variance of the two
    means adds to the square of the difference of expectations; a response labelled 0 is not read.
Length: sum.
Bounded below: no with unbiased (the correction grows with the spread inside a group); else yes, by 0.
Pins the level: no; the gradients of a group add up to 0.
Limits: one response on each side is IPO (sums). A side with one response has no sample variance and is not corrected.
    A group that lacks a side has loss and gradient 0 (metric mipo_multisample/skipped).
Departures: the paper has k responses on each side; here the sides may differ. "MIPO" is also the name of a method that
    modulates interventions. TRL and HALOs have none.
Unverified: the formula; the paper's text and code were not at hand. That mIPO has an unbiased estimate is in the
    abstract's company (a review, a summary); this correction is derived here, and exact (a test enumerates).
Verified: closed form, with and without unbiased; vectors of an independent script; identity with IPO; unbiasedness by
    enumeration of all samples.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Gt

from po.numeric import masked_mean, masked_var
from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class MIPOMultisample(Head):
    needs: ClassVar[Needs] = Needs(layout="labelled", reference=True, label=True)

    tau: Annotated[float, Gt(0)] = 0.1
    unbiased: bool = True

    @property
    def beta(self) -> float:
        """The scale of the implicit reward: tau plays the part that beta has in DPO."""
        return self.tau

    def __call__(self, x: HeadInput) -> HeadOutput:
        better_GK = (x.label_GK > 0) & x.seg.valid_GK
        worse_GK = (x.label_GK < 0) & x.seg.valid_GK
        u_GK = x.logratio_GK
        gap_G = masked_mean(u_GK, better_GK) - masked_mean(u_GK, worse_GK) - 1 / (2 * self.tau)
        loss_G = gap_G**2
        if self.unbiased:
            for side_GK in (better_GK, worse_GK):
                loss_G = loss_G - masked_var(u_GK, side_GK) / side_GK.sum(-1).clamp(min=1)
        both_G = better_GK.any(-1) & worse_GK.any(-1)
        metrics = {"mipo_multisample/skipped": (~both_G).to(u_GK.dtype)}
        return HeadOutput(torch.where(both_G, loss_G, 0), metrics)

    def start(self, K: int) -> float:
        return 1 / (4 * self.tau**2)
