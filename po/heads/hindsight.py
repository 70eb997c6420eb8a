"""Hindsight self-distillation: each token of a response moves to what the model says of it once it has seen the reply.

Paper: Kleine Buening et al. 2026, Aligning Language Models from User Interactions, arXiv:2603.12273; its offline loss
    (SDPO on logged conversations).

    loss = -mean_t sg(d_t) log pi(y_t | x, y_<t),    d_t = log pi(y_t | x, o, y_<t) - log pi(y_t | x, y_<t)

Symbols: sg = no gradient; o the user's next message; the row's prompt is x, its privileged prompt x with o; center:
    takes the response's mean off d; ignore_first_k: the first so many tokens of a response have no loss and do not
    count in its mean (a response that has no others has loss 0). The metric hindsight/signal is d_t.
Length: mean.
Bounded below: no; the printed loss is a surrogate. Its gradient is the one of KL(pi(. | x) || pi(. | x, o)) at tokens
    that pi(. | x) sampled.
Pins the level: no, with center; without it, tokens that o makes likelier rise and the others fall.
Limits: without o, that is with twice the same prompt, the loss and its gradient are 0. One response a row, the one that
    o answers; of a row with several, the best alone is read.
Departures: the authors' docstring speaks of a signal that is centred per response; their offline loss is not, and so is
    the default here. A later updater of theirs clips d_t. Their optional KL to a reference is not here (0 in their
    runs). TRL 1.16's sdpo and sdft with `sampled_token` have the same loss on fresh samples: sdft here.
Unverified: the paper's text was not at hand; formula and constants are of the authors' code.
Verified: closed form of every option; vectors of an independent script, with and without center. The authors' code was
    read, not run.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge

from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class Hindsight(Head):
    needs: ClassVar[Needs] = Needs(layout="best", unit="response", privileged=True, stops_gradient=True)

    center: bool = False
    ignore_first_k: Annotated[int, Ge(0)] = 0

    def __call__(self, x: HeadInput) -> HeadOutput:
        seg, length_GK = x.seg, x.seg.length_GK
        first_GK = length_GK.flatten().cumsum(0).view_as(length_GK) - length_GK  # responses lie in slot order
        place_T = torch.arange(x.policy_T.numel(), device=x.policy_T.device) - seg.spread(first_GK)
        kept_T = (place_T >= self.ignore_first_k).to(x.policy_T.dtype)
        count_GK = seg.sum(kept_T).clamp(min=1)
        signal_T = (x.privileged_T - x.policy_T).detach()
        mean_GK = seg.sum(kept_T * signal_T) / count_GK
        weight_T = kept_T * (signal_T - seg.spread(mean_GK) if self.center else signal_T)
        return HeadOutput(-seg.sum(weight_T * x.policy_T) / count_GK, {"hindsight/signal": signal_T})
