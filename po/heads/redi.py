"""REDI: raise the right solution's mean log-prob, lower the wrong one's by a smaller weight.

Paper: Xu et al. 2025, Harnessing Negative Signals: Reinforcement Distillation from Teacher Data for LLM Reasoning,
    arXiv:2505.24850.

    loss = -(1/|y_w|) log pi(y_w) + a (1/|y_l|) log pi(y_l)

Symbols: a = alpha, the weight of the negative: 1 is symmetric, 0 is SFT with the mean over each response; |y| the
    tokens of a response with EOS; y_w the better response, y_l the worse.
Length: mean.
Bounded below: no; the negative's likelihood can fall without end. One epoch, a small learning rate, and watch
    logps/chosen, which must not fall.
Pins the level: no for alpha 1, where only the difference of the means counts; else it prefers the chosen one to rise.
Limits: alpha 1 is (2/b) times SimPO without margin as its b -> 0 (in the gradient). No reference, no sigmoid: nothing
    saturates.
Departures: none from the paper. The authors' trainer (loss_type `reinforce`) has an option, off by default and not in
    the paper, that weights negatives by a power of their mean probability; it is not here. TRL and HALOs have none.
Verified: closed form; vectors of an independent script, the authors' code was read and not run.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge

from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class REDI(Head):
    needs: ClassVar[Needs] = Needs(layout="pair")

    alpha: Annotated[float, Ge(0)] = 0.8

    def __call__(self, x: HeadInput) -> HeadOutput:
        chosen_G, rejected_G = x.seg.mean(x.policy_T).unbind(-1)
        return HeadOutput(self.alpha * rejected_G - chosen_G, {"redi/mean_logp_gap": (chosen_G - rejected_G).detach()})
