"""Full instructions for critique, merge and reference-guided verification, in our own words.

Their contents follow the paper's description (arXiv 2512.03244; DeepCritic for critique and merge).
The inputs are in tags, so that headings of a solution cannot be taken for headings of the prompt.
"""

from __future__ import annotations

from .paper_prompts import BAKERY_EXAMPLE, TANK_EXAMPLE, VERIFY

STEP_COUNT_LINE = (
    "The student solution has {{n}} steps: judge each of the {{n}}, no more and no fewer.\n\n"
)

_FORMAT = """\
- For step k a line "## Step k: " with a short title, then the analysis, then a line that is exactly \
"**This step is correct.**" or "**This step is incorrect.**". Use that sentence once per step.
- One blank line between steps, every step of the student, with the student's numbers.
- The last line is "**Verification: Is the answer correct (Yes/No)? Yes**" or \
"**Verification: Is the answer correct (Yes/No)? No**"."""

CRITIQUE = """\
You are an expert in mathematics. Somebody else has verified a student's solution step by step. Judge that \
verification: not the style, but whether each of its judgements is right and for the right reason.

Work through the steps in order. For each one do one of two things, whichever tests it better: derive the step again \
on your own, by another route if there is one, and compare; or attack the verification's argument and look for the \
point where it would break. Do not take a judgement over because it sounds sure.

A verification can fail in four ways. Name the way when you find one:
1. Missed error: the step is wrong, and the verification calls it correct.
2. False alarm: the step is right, and the verification calls it incorrect.
3. Wrong reason: the judgement is right, and the argument given for it is not.
4. Inconsistent verdict: the last line does not follow from the judgements of the steps and from the answer.

Begin with the line "## Critique of the original verification". Then write one paragraph per step: what you did to \
test it, what came out, and which of the four faults there is, or that there is none. End with a paragraph on the last \
line of the verification. Do not write a verification of your own.

<Problem>
{{question}}
</Problem>

<Solution Path>
{{solution}}
</Solution Path>

<Original Verification>
{{verification}}
</Original Verification>"""

MERGE = f"""\
You are given a mathematics problem, a student's solution, a verification of it step by step, and a critique of that \
verification. Make one verification out of the last two.

How to merge:
- Where the critique shows a fault, correct the analysis, and the judgement of the step if it changes. Judge the last \
line again after that: it must agree with the judgements of the steps and with the answer.
- Where the critique finds nothing wrong, keep the judgement and make the analysis richer with what the critique adds.
- Write as one person who thinks while writing: a second look at a step may appear as a natural turn of thought, such \
as checking a result once more. Never mention that there was an earlier verification or a critique.

What to write, with nothing added before or after and no further sections:
{_FORMAT}

<Problem>
{{{{question}}}}
</Problem>

<Solution Path>
{{{{solution}}}}
</Solution Path>

<Original Verification>
{{{{verification}}}}
</Original Verification>

<Critique of the Verification>
{{{{critique}}}}
</Critique of the Verification>

{{{{step_count}}}}Merged Verification:"""

_NO_KEY = "No answer key is available: find out for yourself whether each step holds."
_WITH_KEY = (
    "The expected answer stands after the solution: use it to decide on the last line and to look for the step that "
    "goes wrong when the student's answer differs. Still judge every step by its own reasoning."
)
_ENDING = "{{step_count}}Teacher Verification:"


def _with_reference() -> str:
    """``VERIFY`` with the expected answer after every solution, the two examples included."""
    text = VERIFY.replace(_NO_KEY, _WITH_KEY).replace(
        _ENDING, "Expected Answer: {{expected_answer}}\n\n" + _ENDING
    )
    for example, answer in ((BAKERY_EXAMPLE, "216"), (TANK_EXAMPLE, "186.45")):
        shown = example.replace(
            "\n\nTeacher Verification:", f"\n\nExpected Answer: {answer}\n\nTeacher Verification:"
        )
        text = text.replace(example, shown)
    return text


VERIFY_WITH_REFERENCE = _with_reference()
