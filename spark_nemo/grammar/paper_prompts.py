r"""Full instructions of the ``paper`` prompt set, in our own words.

The renderers write the worked examples, so these are in the grammar by construction.
"""

from __future__ import annotations

from .steps import render_solution
from .verification import StepJudgement, render_verification

SOLVE = """\
Solve the mathematics problem below one step at a time.

Write the solution as numbered steps. Begin every step on a new line with "Step k:" where k counts 1, 2, 3, and so on. \
A step makes one move of the argument and gives the reason for it together with the calculation. Do not skip work, and \
do not merge unrelated moves into one step. Do not start any other line with "Step" and a number.

After the last step write exactly one line "Answer: " followed by the final answer alone. Do not use \\boxed. Write \
nothing after that line.

Problem: {{question}}"""

POLICY = """\
Solve the mathematics problem below. The response has two parts and nothing before, between or after them.

1. The reasoning, inside one pair of <think> and </think> tags. Put each logical step of it into its own pair of \
<step> and </step> tags. All reasoning text stands inside a step, and a step holds no other tag.
2. The final answer, inside one pair of <answer> and </answer> tags, written as \\boxed{...} on a single line. Use \
\\boxed exactly once in the whole response.

Example problem: A crate holds 12 bottles. How many bottles are in 3 crates when 5 bottles are missing?
Example response:
<think>
<step>Three full crates hold 3 * 12 = 36 bottles.</step>
<step>With 5 bottles missing, 36 - 5 = 31 bottles are left.</step>
</think>
<answer>\\boxed{31}</answer>

Problem: {{question}}"""

STEP_COUNT_LINE = (
    "The student solution has {{n}} steps: judge each of the {{n}}, no more and no fewer.\n\n"
)

_RULES = """\
You are a mathematics teacher who marks a student's solution. No answer key is available: find out for yourself \
whether each step holds.

How to mark:
- Take the steps in the order they stand. For each one redo the reasoning and the calculation yourself, and only then \
judge it.
- A step is either correct or incorrect; there is nothing in between. An arithmetic slip, a false claim, a missing \
case or a gap in the reasoning makes it incorrect.
- A step that builds on a wrong result of an earlier step is incorrect as well, even if its own arithmetic is right.
- A confident tone proves nothing, and a right final answer does not repair a wrong step.
- The answer is correct only if it is the true answer to the question.

What to write, with nothing added before or after:
- For step k a line "## Step k: " with a short title, then your analysis, then a line that is exactly \
"**This step is correct.**" or "**This step is incorrect.**". Use that sentence once per step.
- Leave one blank line between steps, and mark every step of the student, with the student's numbers.
- End with the line "**Verification: Is the answer correct (Yes/No)? Yes**" or \
"**Verification: Is the answer correct (Yes/No)? No**"."""

_BAKERY_QUESTION = (
    "A bakery sells muffins for 3 dollars each. It sold 24 muffins on Monday and twice as many on Tuesday. How many "
    "dollars did it take on the two days together?"
)
_BAKERY_STEPS = (
    "Twice as many as 24 is 2 * 24 = 48, so 48 muffins were sold on Tuesday.",
    "On both days together 24 + 48 = 72 muffins were sold.",
    "At 3 dollars each this makes 72 * 3 = 216 dollars.",
)
_BAKERY_JUDGEMENTS = (
    StepJudgement(
        "Tuesday's sales",
        "The problem says that Tuesday's number is twice Monday's, which is 24. I get 2 * 24 = 48 too.",
        True,
    ),
    StepJudgement(
        "Muffins on both days",
        "The question is about both days, so the two numbers have to be added: 24 + 48 = 72. The sum is right.",
        True,
    ),
    StepJudgement(
        "Money taken",
        "Every muffin costs 3 dollars, so the total is 72 * 3. Since 70 * 3 = 210 and 2 * 3 = 6, this is 216. The step "
        "agrees.",
        True,
    ),
)

_TANK_QUESTION = (
    "A tank holds 200 litres of water. Each day it loses 10% of the water in it, and in the evening 15 litres are "
    "added. How many litres are in the tank after three days?"
)
_TANK_STEPS = (
    "On day 1 the loss is 10% of 200, which is 20 litres, and 180 litres remain.",
    "In the evening 15 litres are added: 180 + 15 = 195 litres.",
    "On day 2 the loss is 10% of 195, which is 19.5 litres, and 175.5 litres remain.",
    "In the evening 15 litres are added: 175.5 + 15 = 189.5 litres.",
    "On day 3 the loss is 10% of 189.5, which is 18.95 litres, and 170.55 litres remain.",
    "In the evening 15 litres are added: 170.55 + 15 = 185.55 litres.",
)
_TANK_JUDGEMENTS = (
    StepJudgement(
        "Loss on day 1",
        "A tenth of 200 is 20, and 200 - 20 = 180. The loss comes before the refill, as the problem says.",
        True,
    ),
    StepJudgement("Refill on day 1", "15 litres are added to 180, which gives 195.", True),
    StepJudgement(
        "Loss on day 2",
        "A tenth of 195 is 19.5, and 195 - 19.5 = 175.5. Both numbers are right.",
        True,
    ),
    StepJudgement(
        "Refill on day 2",
        "Adding 15 is the right thing to do, but 175.5 + 15 = 190.5. The student wrote 189.5, which is one litre too "
        "little.",
        False,
    ),
    StepJudgement(
        "Loss on day 3",
        "The step starts from 189.5 where 190.5 is needed. The loss should be 19.05 litres, leaving 171.45, so its "
        "numbers are wrong.",
        False,
    ),
    StepJudgement(
        "Refill on day 3",
        "This adds 15 to the wrong 170.55. From 171.45 the amount is 186.45 litres, so 185.55 is not the answer.",
        False,
    ),
)


def _example(
    question: str,
    steps: tuple[str, ...],
    answer: str,
    judgements: tuple[StepJudgement, ...],
    answer_correct: bool,
) -> str:
    return (
        f"Question: {question}\n\nStudent Solution:\n{render_solution(steps, answer)}\n\n"
        f"Teacher Verification:\n{render_verification(judgements, answer_correct)}"
    )


BAKERY_EXAMPLE = _example(_BAKERY_QUESTION, _BAKERY_STEPS, "216", _BAKERY_JUDGEMENTS, True)
TANK_EXAMPLE = _example(_TANK_QUESTION, _TANK_STEPS, "185.55", _TANK_JUDGEMENTS, False)

VERIFY = "\n\n".join(
    [
        _RULES,
        "Two examples follow, then the solution to mark.",
        f"--- Example 1 ---\n\n{BAKERY_EXAMPLE}",
        f"--- Example 2 ---\n\n{TANK_EXAMPLE}",
        "--- To mark ---\n\nQuestion: {{question}}\n\nStudent Solution:\n{{solution}}\n\n"
        "{{step_count}}Teacher Verification:",
    ]
)
