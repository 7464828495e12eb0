"""Splitting responses, and mapping steps to sampled tokens."""

import itertools

import pytest
from grammar_strategies import anything, solutions, tagged
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from spark_nemo.grammar import (
    ParsedResponse,
    StepFormat,
    canonical_solution,
    decode_tokens,
    legal_step_text,
    render_solution,
    split_response,
    token_spans,
)
from spark_nemo.records import ParseFailure

quick = settings(max_examples=150, deadline=None)


@quick
@given(solutions())
def test_plain_split_inverts_render(solution):
    """Every solution that can be written reads back exactly; says nothing about texts of another
    origin.
    """
    steps, answer = solution
    parsed = split_response(render_solution(steps, answer), StepFormat.PLAIN)
    assert isinstance(parsed, ParsedResponse)
    assert (parsed.step_texts, parsed.answer) == (steps, answer)


@settings(max_examples=300, deadline=None)
@given(anything, st.sampled_from(StepFormat))
def test_any_text_splits_or_fails(text, fmt):
    """No text crashes a splitter, and what it accepts has a canonical text that means the same."""
    parsed = split_response(text, fmt)
    if isinstance(parsed, ParsedResponse):
        again = split_response(canonical_solution(parsed), StepFormat.PLAIN)
        assert (again.step_texts, again.answer) == (parsed.step_texts, parsed.answer)


@quick
@given(solutions(), st.sampled_from(StepFormat), st.data())
def test_truncated_responses_split_or_fail(solution, fmt, data):
    """A valid response cut anywhere neither crashes a splitter nor gains a step."""
    text = tagged(*solution) if fmt is StepFormat.TAGGED else render_solution(*solution)
    parsed = split_response(text[: data.draw(st.integers(0, len(text)))], fmt)
    assert isinstance(parsed, ParseFailure) or len(parsed.steps) <= len(solution[0])


@quick
@given(solutions(), st.sampled_from(StepFormat), st.sampled_from(["", "\n", " \n\n"]))
def test_steps_touch_and_end_before_the_answer(solution, fmt, gap):
    """Steps follow each other without gap or overlap, and the answer comes after the last."""
    body = tagged(*solution, gap) if fmt is StepFormat.TAGGED else render_solution(*solution)
    parsed = split_response(gap + body + gap, fmt)
    assume(not isinstance(parsed, ParseFailure))
    for before, after in itertools.pairwise(parsed.steps):
        assert before.start < before.end == after.start
    assert parsed.steps[-1].end <= parsed.answer_start < parsed.answer_end


@st.composite
def tokenised(draw):
    """A response's bytes cut anywhere, with empty tokens and a tail of end-of-sequence tokens."""
    steps, answer = draw(solutions())
    steps = [step.encode("utf-8", "replace").decode() for step in steps]
    fmt = draw(st.sampled_from(StepFormat))
    answer = answer.encode("utf-8", "replace").decode()
    text = (
        tagged(steps, answer)
        if fmt is StepFormat.TAGGED
        else f"Well. é\n{render_solution(steps, answer)}"
    )
    parsed = split_response(text, fmt)
    assume(isinstance(parsed, ParsedResponse))
    data = text.encode()
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=30)))
    tokens = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)])]
    return tokens + draw(st.sampled_from([[], [b"<|im_end|>"], [b"", b"\xff"]])), parsed


@quick
@given(tokenised())
def test_token_spans_tile_and_hold_the_first_bytes(case):
    """Whatever the tokens, spans touch and hold the tokens whose first byte is in the step."""
    tokens, parsed = case
    spans = token_spans(tokens, parsed)
    assert all(before.end == after.start for before, after in itertools.pairwise(spans))
    for step, span in zip(parsed.steps, spans):
        first, last = (len(parsed.text[:at].encode()) for at in (step.start, step.end))
        starts = [sum(map(len, tokens[:position])) for position in range(len(tokens))]
        assert list(range(span.start, span.end)) == [
            i for i, start in enumerate(starts) if first <= start < last
        ]


def test_token_that_straddles_a_boundary_counts_for_its_first_byte():
    """The token "a\\nSt" begins in step 1 and so is step 1's, whole; "\\nAnswer: 4" begins in step
    2.
    """
    tokens = [b"Step 1: ", b"a\nSt", b"ep 2: b", b"\nAnswer: 4", b"<eos>"]
    parsed = split_response("Step 1: a\nStep 2: b\nAnswer: 4", StepFormat.PLAIN)
    assert [(span.start, span.end) for span in token_spans(tokens, parsed)] == [(0, 2), (2, 4)]


def test_token_spans_survive_a_split_and_an_invalid_character():
    """Tokens that split a character or are no UTF-8 at all move no boundary, given the text of
    decode_tokens.
    """
    tokens = [b"Step 1: \xf0\x9f", b"\x98\x80\xff\xc3", b"\nStep 2: b\nAnswer: 4"]
    parsed = split_response(decode_tokens(tokens), StepFormat.PLAIN)
    assert parsed.steps[0].text == "\U0001f600��"
    starts = [0, 10, 14]
    boundary = len(b"".join(tokens[:2])) + 1
    assert [(s.start, s.end) for s in token_spans(tokens, parsed)] == [
        (0, sum(start < boundary for start in starts)),
        (3, 3),
    ]


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60))
def test_offsets_agree_with_pythons_decoder(data):
    """Our own decoder gives the very text of Python's replacement, whatever the bytes."""
    from spark_nemo.grammar.steps import _decode_with_offsets

    text, offsets = _decode_with_offsets(data)
    assert text == decode_tokens([data])
    assert (
        len(offsets) == len(text) + 1
        and offsets == sorted(set(offsets))
        and offsets[-1] == len(data)
    )


def test_token_spans_reject_tokens_of_another_text():
    """Spans of another text's tokens would be wrong silently, so they are an error."""
    parsed = split_response("Step 1: a\nAnswer: 4", StepFormat.PLAIN)
    with pytest.raises(ValueError, match="from character 8 on"):
        token_spans([b"Step 1: b\nAnswer: 4"], parsed)


@pytest.mark.parametrize(
    "text",
    [
        "Step 1: x\nStep 2: y\nAnswer: 4",
        "Let me think.\n\n**Step 1:** x\n\n**Step 2:** y\n\n**Answer:** 4\n",
        "**Step 1**: x\n**Step 2**: y\n**Answer**: 4",
        "## Step 1: x\n### Step 2: y\n## Answer: \\boxed{4}",
        "step 1: x\r\nstep 2 : y\r\nanswer: 4\r\n",
        "**Step 1: x**\n**Step 2: y**\n**Answer: 4**",
    ],
)
def test_accepted_spellings_of_plain(text):
    """Headers that language models write mean the same as the plain ones."""
    parsed = split_response(text, StepFormat.PLAIN)
    assert canonical_solution(parsed) == "Step 1: x\nStep 2: y\nAnswer: 4"


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", "steps_missing"),
        ("Answer: 4", "steps_missing"),
        ("Step 2: x\nAnswer: 4", "step_numbering"),
        ("Step 1: x\nStep 3: y\nAnswer: 4", "step_numbering"),
        ("Step 1: x\nStep 01: y\nAnswer: 4", "step_numbering"),
        ("Step 1:\nStep 2: y\nAnswer: 4", "step_empty"),
        ("Step 1: x", "answer_missing"),
        ("Step 1: x\nAnswer: 4\nAnswer: 5", "answer_repeated"),
        ("Answer: 4\nStep 1: x", "answer_not_last"),
        ("Step 1: x\nAnswer: 4\nI hope this helps.", "answer_not_last"),
        ("Step 1: x\nAnswer:", "answer_empty"),
    ],
)
def test_plain_failures_name_their_rule(text, rule):
    """Each broken rule of the plain format is told apart."""
    assert split_response(text, StepFormat.PLAIN).reason.startswith(rule)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", "tag_order"),
        ("<think></think><answer>4</answer>", "tag_order"),
        ("<think><step>x</think><answer>4</answer>", "tag_order"),
        ("<think><step>x</step></think>", "tag_order"),
        ("<think><step>x</step></think><answer>4</answer><answer>5</answer>", "tag_order"),
        ("<think><step>a<step>x</step></step></think><answer>4</answer>", "tag_order"),
        ("Hi <think><step>x</step></think><answer>4</answer>", "text_outside_tags"),
        ("<think>so <step>x</step></think><answer>4</answer>", "text_outside_tags"),
        ("<think><step>x</step></think> so <answer>4</answer>", "text_outside_tags"),
        ("<think><step>x</step></think><answer>4</answer>!", "text_outside_tags"),
        ("<think><step> </step></think><answer>4</answer>", "step_empty"),
        ("<think><step>Step 2: x</step></think><answer>4</answer>", "step_numbering"),
        ("<think><step>x\nStep 2: y</step></think><answer>4</answer>", "step_contains_header"),
        ("<think><step>x\nAnswer: 5</step></think><answer>4</answer>", "step_contains_header"),
        ("<think><step>x</step></think><answer> </answer>", "answer_empty"),
        ("<think><step>x</step></think><answer>4\n5</answer>", "answer_multiline"),
    ],
)
def test_tagged_failures_name_their_rule(text, rule):
    """Each broken rule of the tagged format has its own error, a plain header in a step too."""
    assert split_response(text, StepFormat.TAGGED).reason.startswith(rule)


def test_both_formats_have_one_canonical_text():
    """The verifier cannot tell which format a response had: the distribution shift between them is
    gone.
    """
    steps, answer = ("Add 1 to 2.", "Check:\n3 = 3."), "3"
    sources = [
        split_response(tagged(steps, answer), StepFormat.TAGGED),
        split_response(
            tagged([f"Step {k}: {s}" for k, s in enumerate(steps, 1)], answer), StepFormat.TAGGED
        ),
        split_response(render_solution(steps, answer), StepFormat.PLAIN),
    ]
    assert {canonical_solution(parsed) for parsed in sources} == {render_solution(steps, answer)}


@quick
@given(st.lists(anything, min_size=1, max_size=4))
def test_foreign_steps_can_be_made_legal(paragraphs):
    """Any paragraph with content becomes a step, and as many come back as went in."""
    steps = []
    for paragraph in paragraphs:
        try:
            steps.append(legal_step_text(paragraph))
        except ValueError:
            assume(False)
    assert split_response(render_solution(steps, "4"), StepFormat.PLAIN).step_texts == tuple(steps)


@pytest.mark.parametrize(
    ("steps", "answer", "match"),
    [
        ([], "4", "at least one"),
        ([""], "4", "step 1"),
        (["x "], "4", "step 1"),
        (["x", "y\nStep 3: z"], "4", "step 2"),
        (["x"], "", "answer"),
        (["x"], "4\n5", "answer"),
        (["x"], "\\boxed{4}", "answer"),
    ],
)
def test_render_rejects_texts_that_would_not_parse_back(steps, answer, match):
    """A text that would change its meaning is an error that names the place."""
    with pytest.raises(ValueError, match=match):
        render_solution(steps, answer)
