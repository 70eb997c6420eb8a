"""pi-Distill: one model as a teacher that sees privileged information and as the student that does not, both trained.

Paper: Penaloza et al. 2026, Privileged Information Distillation for Language Models, arXiv:2602.04942.

    loss = alpha L_T + (1 - alpha) L_S
    L_T = P(pi_T(y) / mu(y)) + beta mean_t sg(log pi_T(y_t) - log pi_S(y_t)) log pi_T(y_t)
    L_S = P(pi_S(y) / mu(y)) + beta mean_t (sg(log pi_T(y_t)) - log pi_S(y_t))
    P(r) = -min(r A, clip(r, 1 - e, 1 + e) A),    A = (R - mean(R)) / std(R) over the responses of the prompt

Symbols: sg = no gradient; pi_S the student, after the row's prompt; pi_T the teacher, the same weights after the row's
    privileged prompt; mu the teacher when it sampled y: responses come from the privileged prompt, and so do the
    sampler's log-probs. alpha: the teacher's share; beta: of the KLs; e = epsilon; scale: the standard deviation
    divides by n - 1 (unbiased), by n (population), or A is R - mean(R) (none).
Length: sum in the ratios; the KLs are means.
Bounded below: no.
Pins the level: no; beta keeps teacher and student together.
Limits: alpha = 1 trains the teacher alone, and the student by shared weights; alpha = 0 the student alone, on the
    teacher's samples (which is not opsd, whatever a note says). The student's ratio of a long response is far from
    1 where the information matters, and then its term has little gradient or none (pi_distill/student_ratio and
    pi_distill/student_clip); the KL remains. On samples of the student's prompt the loss is wrong; the sign of it is a
    pi_distill/teacher_ratio far from 1 at the first step.
Departures: mu stands where the paper has the teacher as a constant, which it is on the first step after sampling. The
    gradient of a KL at samples of its first argument is the score-function one, position by position.
Unverified: clip and its width (the notes say GRPO), the KLs as means over tokens, the estimator of std; the paper's
    text was not at hand and its code is a placeholder. Formula from notes.
Verified: closed form of every option, gradients for both prompts. No public code to run.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Le

from po.numeric import clip_ended, clipped_surrogate, group_advantages, importance_ratio
from po.types import Head, HeadInput, HeadOutput, Needs


@dataclass(frozen=True)
class PiDistill(Head):
    needs: ClassVar[Needs] = Needs(
        layout="set",
        unit="response",
        reward=True,
        behaviour=True,
        correction=True,
        privileged=True,
        samples_from="privileged",
        stops_gradient=True,
    )

    alpha: Annotated[float, Ge(0), Le(1)] = 0.5
    beta: Annotated[float, Ge(0)] = 0.1
    epsilon: Annotated[float, Gt(0), Le(1)] = 0.2
    scale: Literal["population", "unbiased", "none"] = "unbiased"

    def __call__(self, x: HeadInput) -> HeadOutput:
        seg, student_T, teacher_T = x.seg, x.policy_T, x.privileged_T
        A_GK = group_advantages(x.reward_GK, seg.valid_GK, self.scale)
        ratio_T_GK, ratio_S_GK = (importance_ratio(seg.sum(p), seg.sum(x.old_T)) for p in (teacher_T, student_T))
        gain_T_GK, gain_S_GK = (
            clipped_surrogate(r, A_GK, self.epsilon, self.epsilon) for r in (ratio_T_GK, ratio_S_GK)
        )
        gap_T = (teacher_T - student_T).detach()
        of_teacher_T = seg.spread(gain_T_GK) + self.beta * gap_T * teacher_T
        of_student_T = seg.spread(gain_S_GK) + self.beta * (teacher_T.detach() - student_T)
        loss_T = x.correction_T * (self.alpha * of_teacher_T + (1 - self.alpha) * of_student_T)
        low_GK, high_GK = clip_ended(ratio_S_GK, A_GK, self.epsilon, self.epsilon)
        metrics = {
            "pi_distill/kl": gap_T,
            "pi_distill/teacher_ratio": ratio_T_GK.detach(),
            "pi_distill/student_ratio": ratio_S_GK.detach(),
            "pi_distill/student_clip": low_GK + high_GK,
        }
        return HeadOutput(seg.mean(loss_T), metrics)
