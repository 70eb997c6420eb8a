"""The requests of spar, self_rewarding, pu_rl and steps. Ours, not the authors'; a changed one has a higher version."""

from __future__ import annotations

from po.prep.prompts import Prompt

SPAR_JUDGE = Prompt(
    "spar-judge",
    1,
    """Below are a task and an answer to it. Find out whether the answer does everything that the task asks for.

Go through what the task asks for, one thing after the other: contents, form, length, order, tone, whatever it
names. Say for each whether the answer does it, and where it does not, what is wrong and how that could be
mended. Then write one last line, which is exactly "Verdict: yes" if the answer does everything, or exactly
"Verdict: no" if anything is missing or wrong.

<task>
{task}
</task>

<answer>
{answer}
</answer>""",
)

SPAR_REFINE = Prompt(
    "spar-refine",
    1,
    """Below are a task, an answer that falls short of it, and what a reader found when checking that answer.

Rework the answer so that it does everything that the task asks for. Mend what the reader found, and leave what
was not at fault as it is: the same subject, the same words, the same order.

Reply with [[REFINED]] on a line of its own and under it the whole reworked answer and nothing else. It must
stand alone as an answer to the task: it does not speak of the reader, of an earlier answer, or of having been
reworked.

<task>
{task}
</task>

<answer>
{answer}
</answer>

<found>
{critique}
</found>""",
    "[[REFINED]]",
)

POINTS = Prompt(
    "self_rewarding-points",
    1,
    """Below are a request and a reply to it. Give the reply from 0 to 5 points. It starts with none, and each of these
gives it one more, in this order; the first that is not met ends the count.

- It has to do with the request and says something of use, even where much is missing or beside the point.
- It takes care of a good part of the request, though not of all of it.
- It meets the request at its core, so that whoever asked can work with it.
- It is complete, clear and in good order, and written for whoever asked; little could be better.
- It is as good as an expert would make it: right in every detail, to the point, nothing superfluous.

Say in a few sentences which are met. Then write one last line, which is exactly "Score: " and the number of
points.

<request>
{task}
</request>

<reply>
{answer}
</reply>""",
)

WITH_ANCHOR = Prompt(
    "pu_rl-anchor",
    1,
    """Below are a request and two replies to it. Compare how correct, complete and helpful they are. Is the {place}
reply better than the other one? Answer with one word, yes or no.

<request>
{task}
</request>

<first>
{first}
</first>

<second>
{second}
</second>""",
)

EACH_OTHER = Prompt(
    "pu_rl-each-other",
    1,
    """Below are a request, a reply to it that is known to be good, and two more replies. Take the good reply as the
measure of what is correct, complete and helpful. Is the first reply better than the second one? Answer with
one word, yes or no.

<request>
{task}
</request>

<good>
{anchor}
</good>

<first>
{first}
</first>

<second>
{second}
</second>""",
)

CONTINUE = Prompt(
    "steps-continue",
    1,
    """Below are a problem and the beginning of a solution, which may or may not be right so far. Go on from exactly
where the beginning ends, in the same manner, until the final answer. Neither repeat the beginning nor start
anew.

<problem>
{task}
</problem>

<beginning>
{prefix}
</beginning>""",
)
