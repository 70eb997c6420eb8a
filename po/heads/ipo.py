"""Identity Preference Optimization: regress the margin onto 1 / (2 tau) instead of driving it to infinity.

Paper: Azar et al. 2023, A General Theoretical Paradigm to Understand Learning from Human Preferences,
    arXiv:2310.12036, Eq. 17.

    loss = (h - 1 / (2 t))^2,    h = u(y_w) - u(y_l),    u(y) = sum_i log pi/ref(y_i)
                                                   or  (1/|y|) sum_i log pi/ref(y_i)  with length_normalize

Symbols: t = tau, the strength of the regularisation (TRL and HALOs call it beta); length_normalize: u is the mean over
    the response's tokens, |y| with EOS, and the target 1 / (2 t) is then in nats per token; y_w the better response,
    y_l the worse.
Length: sum (the paper); mean with length_normalize.
Bounded below: yes, by 0.
Pins the level: no.
Limits: least at h = 1 / (2 t) in every pair; the gradient at policy == reference is 1/t, so small tau wants clipping.
Departures: none known. TRL 1.16 and HALOs use the mean (TRL: the authors confirmed that the published results
    do); eric-mitchell and OpenRLHF the sum. HALOs divides by the tokens with a non-zero log-ratio: NaN at step 0.
Verified: closed form; vectors on which the executed code of eric-mitchell (sum), TRL 1.16 and HALOs (mean) agrees.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Gt

from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class IPO(Head):
    needs: ClassVar[Needs] = Needs(layout="pair", reference=True)

    tau: Annotated[float, Gt(0)] = 0.1
    length_normalize: bool = False

    @property
    def beta(self) -> float:
        """The scale of the implicit reward: tau plays the part that beta has in DPO."""
        return self.tau

    def __call__(self, x: HeadInput) -> HeadOutput:
        u_GK = x.seg.mean(x.logratio_T) if self.length_normalize else x.logratio_GK
        chosen_G, rejected_G = u_GK.unbind(-1)
        gap_G = chosen_G - rejected_G - 1 / (2 * self.tau)
        return HeadOutput(gap_G**2, {"ipo/target_gap": gap_G.detach()})

    def start(self, K: int) -> float:
        return 1 / (4 * self.tau**2)
