"""Steps of a response, and the sampled tokens of each step.

The verifier and the reward model see every response in the plain format of ``render_solution``.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from enum import StrEnum
from itertools import accumulate

from spark_nemo.records import ParsedResponse, ParseFailure, Step, TokenSpan

from .markers import ANSWER_HEADER, ANY_HEADER, STEP_HEADER, after_header, find_boxes


class StepFormat(StrEnum):
    r"""Format in which a response marks its steps.

    TAGGED is the policy's ``<think><step>..</step>..</think><answer>\boxed{..}</answer>``; PLAIN is
    the generator's ``Step 1: ..`` to ``Answer: ..`` (accepted spellings: ``markers``).
    """

    TAGGED = "tagged"
    PLAIN = "plain"


def split_response(text: str, fmt: StepFormat) -> ParsedResponse | ParseFailure:
    """Parse a response (special tokens removed). Never raises; a failure names the broken rule."""
    if StepFormat(fmt) is StepFormat.TAGGED:
        return _split_tagged(text)
    return _split_plain(text)


def render_solution(steps: Sequence[str], answer: str | None) -> str:
    """``Step 1: ..`` lines and ``Answer: ..``; the inverse of the PLAIN split.

    ``answer=None`` omits the answer line, for benchmark solutions without one; such a text does not
    parse back. Raises ``ValueError`` naming the step if a text would parse as something else;
    ``legal_step_text`` repairs benchmark steps.
    """
    if not steps:
        raise ValueError("render_solution: a solution needs at least one step")
    for number, step in enumerate(steps, start=1):
        if reason := _step_fault(step):
            raise ValueError(f"render_solution: step {number}: {reason}")
    lines = [f"Step {number}: {step}" for number, step in enumerate(steps, start=1)]
    if answer is not None:
        if not answer or answer != _clean_answer(answer) or "\n" in answer:
            raise ValueError(
                f"render_solution: answer {answer!r} must be one stripped, unboxed, non-empty line"
            )
        lines.append(f"Answer: {answer}")
    return "\n".join(lines)


def canonical_solution(parsed: ParsedResponse) -> str:
    """Return the plain text that verifier and reward model see; never raises after `split_response`."""
    return render_solution(parsed.step_texts, parsed.answer)


def legal_step_text(text: str) -> str:
    """Make a benchmark's paragraph a legal step for ``render_solution``.

    A leading header is dropped, and the colon of any other header becomes a dash. Raises
    ``ValueError`` if nothing is left.
    """
    stripped = text.strip()
    header = STEP_HEADER.match(stripped)
    body = after_header(stripped, header, len(stripped)) if header else stripped
    if not body:
        raise ValueError(f"legal_step_text: {text!r} has no content")
    return ANY_HEADER.sub(lambda match: match.group().replace(":", " -"), body)


def decode_tokens(token_bytes: Sequence[bytes]) -> str:
    """Text of sampled tokens: their bytes joined, with U+FFFD for invalid UTF-8."""
    return b"".join(token_bytes).decode("utf-8", errors="replace")


def token_spans(token_bytes: Sequence[bytes], parsed: ParsedResponse) -> tuple[TokenSpan, ...]:
    """Token range of each step, from the bytes of the sampled tokens.

    A token belongs to the step that has its first byte (an empty token: the byte after it), so
    ranges never overlap and each starts where the previous one ends. A step inside one longer token
    gets an empty range. Tokens after the text (the end-of-sequence token) belong to no step. Raises
    ``ValueError`` if the tokens do not decode to ``parsed.text`` plus at most such a tail.
    """
    data = b"".join(token_bytes)
    text, char_to_byte = _decode_with_offsets(data)
    if not text.startswith(parsed.text):
        pairs = enumerate(zip(text, parsed.text))
        differing = [index for index, (a, b) in pairs if a != b]
        at = differing[0] if differing else min(len(text), len(parsed.text))
        raise ValueError(
            f"token_spans: the tokens' bytes and the parsed text differ from character {at} on"
        )
    starts = list(accumulate(map(len, token_bytes), initial=0))[:-1]
    return tuple(
        TokenSpan(
            bisect_left(starts, char_to_byte[step.start]),
            bisect_left(starts, char_to_byte[step.end]),
        )
        for step in parsed.steps
    )


def _decode_with_offsets(data: bytes) -> tuple[str, list[int]]:
    """``data.decode("utf-8", "replace")``, and the byte offset of every character and of the end."""
    if data.isascii():
        return data.decode("ascii"), list(range(len(data) + 1))
    characters: list[str] = []
    offsets: list[int] = []
    position = 0
    while position < len(data):
        try:
            good = data[position:].decode("utf-8")
            bad_length = 0
        except UnicodeDecodeError as error:
            good = data[position : position + error.start].decode("utf-8")
            bad_length = error.end - error.start
        for character in good:
            characters.append(character)
            offsets.append(position)
            position += len(character.encode("utf-8"))
        if bad_length:
            characters.append("�")
            offsets.append(position)
            position += bad_length
    return "".join(characters), [*offsets, len(data)]


_TAG = re.compile(r"</?(?:think|step|answer)>")


def _split_tagged(text: str) -> ParsedResponse | ParseFailure:
    tags = list(_TAG.finditer(text))
    names = [tag.group() for tag in tags]
    num_steps = (len(tags) - 4) // 2
    expected = ["<think>", *["<step>", "</step>"] * num_steps, "</think>", "<answer>", "</answer>"]
    if num_steps < 1 or names != expected:
        misplaced = [name for name, want in zip(names, expected) if name != want]
        found = misplaced[0] if misplaced else "the end"
        return ParseFailure(f"tag_order: {found} is out of place, missing or repeated")
    ends = [0, *(tag.end() for tag in tags)]
    starts = [*(tag.start() for tag in tags), len(text)]
    # Only <step> and <answer> are followed by content; other gaps are white space.
    for gap, opener in enumerate(["", *names]):
        if opener not in ("<step>", "<answer>") and text[ends[gap] : starts[gap]].strip():
            return ParseFailure(f"text_outside_tags: after {opener or 'the beginning'}")
    steps = []
    for index in range(num_steps):
        opening = tags[1 + 2 * index]
        closing = tags[2 + 2 * index]
        following = tags[3 + 2 * index]
        body = _tagged_step_text(text[opening.end() : closing.start()].strip(), index + 1)
        if isinstance(body, ParseFailure):
            return body
        steps.append(Step(body, opening.start(), following.start()))
    answer_tag = tags[-2]
    answer_close = tags[-1]
    answer = _clean_answer(text[answer_tag.end() : answer_close.start()])
    return _with_answer(text, steps, answer, answer_tag.start(), answer_close.end())


def _tagged_step_text(body: str, number: int) -> str | ParseFailure:
    """Content of a tagged step; a leading ``Step k:`` with its own number is dropped."""
    reason = _step_fault(body)
    if reason is not None:
        return ParseFailure(f"{reason.partition(':')[0]}: step {number}")
    header = STEP_HEADER.match(body)
    if header is None:
        return body
    if header["number"] != str(number):
        return ParseFailure(
            f"step_numbering: step {number} calls itself Step {header['number'][:8]}"
        )
    return after_header(body, header, len(body)) or ParseFailure(f"step_empty: step {number}")


def _split_plain(text: str) -> ParsedResponse | ParseFailure:
    headers = list(STEP_HEADER.finditer(text))
    answers = list(ANSWER_HEADER.finditer(text))
    if not headers:
        return ParseFailure("steps_missing: no line starts with 'Step 1:'")
    for number, header in enumerate(headers, start=1):
        if header["number"] != str(number):
            return ParseFailure(
                f"step_numbering: Step {header['number'][:8]} where Step {number} was expected"
            )
    if not answers:
        return ParseFailure("answer_missing")
    if len(answers) > 1:
        return ParseFailure(f"answer_repeated: {len(answers)} 'Answer:' lines")
    answer_header = answers[0]
    if answer_header.start() < headers[-1].start():
        return ParseFailure("answer_not_last: a step follows the 'Answer:' line")
    bounds = [*(header.start() for header in headers), answer_header.start()]
    steps = []
    for index, header in enumerate(headers):
        body = after_header(text, header, bounds[index + 1])
        if not body:
            return ParseFailure(f"step_empty: step {index + 1}")
        steps.append(Step(body, bounds[index], bounds[index + 1]))
    line_end = text.find("\n", answer_header.end())
    answer_end = len(text) if line_end < 0 else line_end
    if text[answer_end:].strip():
        return ParseFailure("answer_not_last: text follows the 'Answer:' line")
    answer = _clean_answer(after_header(text, answer_header, answer_end))
    return _with_answer(text, steps, answer, answer_header.start(), answer_end)


def _with_answer(
    text: str, steps: list[Step], answer: str, start: int, end: int
) -> ParsedResponse | ParseFailure:
    if not answer:
        return ParseFailure("answer_empty")
    if "\n" in answer:
        return ParseFailure("answer_multiline: the answer must be one line")
    return ParsedResponse(text, tuple(steps), answer, start, end)


def _clean_answer(text: str) -> str:
    """Content of the answer's box if it has exactly one, else the answer itself, stripped."""
    boxes = find_boxes(text)
    if len(boxes) == 1:
        return boxes[0].content.strip()
    return text.strip()


def _step_fault(text: str) -> str | None:
    """Reason why ``Step k: {text}`` would not parse as this step, or None."""
    if not text:
        return "step_empty: the text is empty"
    if text != text.strip():
        return "step_unstripped: white space at an end of the text"
    # The first line may look like a header: in plain text it follows "Step k: ".
    newline = text.find("\n")
    if newline >= 0 and ANY_HEADER.search(text, newline + 1):
        return "step_contains_header: a line of the text looks like a 'Step k:' or 'Answer:' line"
    return None
