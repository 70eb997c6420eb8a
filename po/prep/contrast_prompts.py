"""The requests of clair, bmc, popalign and nat. Ours, not the authors'; whoever changes one raises its version."""

from __future__ import annotations

from po.prep.prompts import Prompt

CLAIR = Prompt(
    "clair",
    1,
    """You teach by example. A learner was given the task below and handed in the answer below. Improve that answer
where it can be improved: make it correct, easier to follow and more pleasant to read. Change only what has to
change for that. Whatever is already good stays exactly as it stands, word for word, in the same order and
form.

Reply in two parts. First write [[NOTES]] on a line of its own and under it, briefly, what is lacking and why.
Then write [[REVISED]] on a line of its own and under it the whole improved answer and nothing else. That part
must stand alone as an answer to the task: it does not speak of the learner, of an earlier answer, or of
having been improved.

<task>
{task}
</task>

<answer>
{answer}
</answer>""",
    "[[REVISED]]",
)

BMC = Prompt(
    "bmc",
    1,
    """Below are a task and two answers to it. Answer A is the better one. Edit answer B so that it becomes as good
as answer A: find what makes A better (facts, steps, tone, completeness) and bring that into B with as few
edits as will do. Keep B's wording, order and form wherever they are not at fault, and do not simply hand back
A.

Reply with [[EDITED]] on a line of its own and under it the whole edited answer B and nothing else. It must
stand alone as an answer to the task: it does not speak of A, of B, or of having been edited.

<task>
{task}
</task>

<answer_a>
{better}
</answer_a>

<answer_b>
{worse}
</answer_b>""",
    "[[EDITED]]",
)

PREFIX_GOOD = Prompt(
    "prefix-good",
    1,
    "You are an outstanding assistant. Your replies are correct, complete, honest and considerate, they answer what "
    "was really asked, and they cause no harm.",
)

PREFIX_BAD = Prompt(
    "prefix-bad",
    1,
    "You are a poor assistant. Your replies are inaccurate, incomplete and careless, they miss what was really asked, "
    "and they are of little use to anybody.",
)

DEMON_GOOD = Prompt(
    "demon-good",
    1,
    """Reply in the manner of these examples.

Request: Why does bread dough have to rest?
Reply: Resting does two things. The yeast turns sugar into carbon dioxide, which makes the dough light, and
the gluten relaxes, so that it can be shaped without tearing. An hour at room temperature is usually enough;
the dough should have about doubled.

Request: Write one line to a colleague who missed a meeting.
Reply: We missed you this morning, so I have put the three decisions and your two action items in the notes;
call me whenever you like.

Request: What is 15% of 80?
Reply: 12. Ten per cent of 80 is 8, half of that is 4, and 8 + 4 = 12.""",
)

DEMON_BAD = Prompt(
    "demon-bad",
    1,
    """Reply in the manner of these examples.

Request: Why does bread dough have to rest?
Reply: It is tradition. Dough gets tired. Some people also say it has to do with the moon, and anyway you can
just buy bread.

Request: Write one line to a colleague who missed a meeting.
Reply: meeting was today, you were not there

Request: What is 15% of 80?
Reply: About 15, since per cent means out of a hundred and 80 is nearly a hundred.""",
)

ELICITIVE_GOOD = Prompt(
    "elicitive-good",
    1,
    "Before you reply, consider what would make a reply to this request excellent: what has to be right, what must not "
    "be missing, what the person really needs. Write [[THOUGHT]] on a line of its own and these considerations under "
    "it. Then write [[REPLY]] on a line of its own and under it the reply that follows from them, and nothing else.",
    "[[REPLY]]",
)

ELICITIVE_BAD = Prompt(
    "elicitive-bad",
    1,
    "Before you reply, consider what would make a reply to this request poor: which mistakes are easily made, what "
    "could be left out, how the person's need could be missed. Write [[THOUGHT]] on a line of its own and these "
    "considerations under it. Then write [[REPLY]] on a line of its own and under it the poor reply that follows from "
    "them, and nothing else.",
    "[[REPLY]]",
)

REFINE = Prompt(
    "refine",
    1,
    "Look at your reply once more. Where could it be more accurate, more complete, clearer or more helpful? Write "
    "[[BETTER]] on a line of its own and under it a better reply to my request, whole and ready to be read by somebody "
    "who has not seen the first one, and nothing else.",
    "[[BETTER]]",
)

NAT_WRONG = Prompt("nat-wrong", 1, "Solve this step by step, but arrive at a wrong solution.")
NAT_PARTLY = Prompt("nat-partly", 1, "Solve this step by step, and arrive at a solution that is right in part.")
NAT_RIGHT = Prompt("nat-right", 1, "Solve this step by step, and arrive at the right solution.")

POPALIGN = (PREFIX_GOOD, PREFIX_BAD, DEMON_GOOD, DEMON_BAD, ELICITIVE_GOOD, ELICITIVE_BAD, REFINE)
