r"""Prompt that asks any chat model for the first wrong paragraph of a solution, as ProcessBench does.

The structure is the benchmark's own (arXiv 2412.06559: numbered paragraphs in tags, the earliest
wrong index or -1 in a box). The words are ours, so scores may differ a little from published ones.
"""

from __future__ import annotations

from collections.abc import Sequence

from spark_nemo.records import content_key

from .prompts import ChatMessages, fill_user_message

CRITIC = """\
Below are a mathematics problem and a solution to it. The solution is cut into paragraphs. Each stands between tags \
that carry its index, and the first index is 0.

[Problem]

{{question}}

[Solution]

{{paragraphs}}

Check the paragraphs in the order they stand: is the reasoning of each sound, and are its calculations right? The \
index of the earliest paragraph that contains an error is your answer. When no paragraph contains one, your answer is \
-1.

Write your check first, then give your answer, which is the index alone, in \\boxed{}."""

CRITIC_VERSION = f"critic-{content_key(CRITIC)[:8]}"
"""Version saved with results: scores of different prompts are not comparable."""


def critic_messages(question: str, steps: Sequence[str]) -> ChatMessages:
    """User message about a solution whose paragraphs are ``steps``, shown unchanged."""
    paragraphs = "\n\n".join(
        f"<paragraph_{index}>\n{step}\n</paragraph_{index}>" for index, step in enumerate(steps)
    )
    return fill_user_message(CRITIC, question=question, paragraphs=paragraphs)
