"""Reading answer keys and comparing answers, hostile ones too."""

import json
import os
import signal
import time
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_nemo.evaluation import (
    DataFileError,
    MathChecker,
    answer_matches,
    read_answer_keys,
    read_eval_problems,
    shared_checker,
)
from spark_nemo.evaluation.checker import AnswerGrade
from spark_nemo.evaluation.saved_completions import read_completions
from spark_nemo.grammar import normalize_answer

DATA = (
    Path(os.environ.get("SPARK_NEMO_DATA") or Path(__file__).parents[2].parent / "shared" / "data")
    / "math"
)


def equal(checker, gold, answer):
    """Compare two answers with math-verify in the checker's worker."""
    return checker.grade(gold, answer) is AnswerGrade.EQUAL


@pytest.mark.parametrize(
    "predicted, gold",
    [
        ("42", "42"),
        (" 42. ", "42"),
        ("$42$", "42"),
        ("27.0", "27"),
        ("1,000", "1000"),
        ("-3", "-3.00"),
        ("x = 7", "7"),
        ("0.5", r"\frac{1}{2}"),
        (r"\dfrac12", r"\frac{1}{2}"),
        ("1/3", "2/6"),
        (r"-\frac{1}{2}", r"\frac{-1}{2}"),
        (r"\text{Evelyn}", "Evelyn"),
        (r"90^\circ", "90"),
        (r"50\%", "50"),
        (r"\left( 1,\ 2 \right)", "(1,2)"),
        ("+5", "5"),
    ],
)
def test_equal_answers_are_recognised_without_the_checker(predicted, gold):
    """The common notations of one value are equal without a question to the worker process."""
    before = shared_checker().stats.questions
    assert answer_matches(predicted, gold)
    assert shared_checker().stats.questions == before


@pytest.mark.parametrize(
    "predicted, gold",
    [
        (None, "1"),
        ("", "1"),
        ("  ", ""),
        ("41", "42"),
        ("420", "42"),
        ("4 2", "43"),
        ("6 = 5", "5"),
        ("5} \\boxed{6", "6"),
        ("5 = 6 = 5", "5"),
        ("9" * 2000, "9"),
        ("\\boxed{5}", "5"),
    ],
)
def test_wrong_and_tricky_answers_are_rejected_without_the_checker(predicted, gold):
    """A policy might learn ``6 = 5``, which math-verify 0.9 accepts for 5, and two boxes."""
    before = shared_checker().stats.questions
    assert not answer_matches(predicted, gold)
    assert shared_checker().stats.questions == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "predicted, gold, equal",
    [
        (r"(3, \pi/2)", r"\left( 3, \frac{\pi}{2} \right)", True),
        ("1+x^2", "x^2+1", True),
        (r"\sqrt{12}", r"2\sqrt{3}", True),
        ("10^3", "1000", True),
        ("x^2+2", "x^2+1", False),
        ("1/2", "1/3", False),
        ("5, 6", "5", False),
        ("5 or 6", "5", False),
        (r"\frac{1}{0}", "1", False),
    ],
)
def test_symbolic_answers_go_to_math_verify(predicted, gold, equal):
    """Equal and unequal expressions; listing several answers does not hit one of them."""
    assert answer_matches(predicted, gold) == equal


@given(st.text(max_size=60) | st.text(alphabet="\\{}()[]^_0123456789.,/+-= $%frac", max_size=60))
@settings(max_examples=200, deadline=None)
def test_normalising_never_fails(text):
    """Any string at all; a string equals itself as an answer unless it is blank."""
    normalize_answer(text)
    assert answer_matches(text, text) == bool(text.strip())


@given(st.integers(-(10**30), 10**30), st.integers(-(10**30), 10**30))
@settings(max_examples=100, deadline=None)
def test_integers_are_compared_exactly(left, right):
    """Beyond the precision of a float, too."""
    assert answer_matches(str(left), str(left) + ".0")
    assert answer_matches(str(left), str(right)) == (left == right)
    assert not answer_matches(str(left), str(left + 1))


@pytest.fixture(scope="module")
def started_checker():
    """Checker whose worker has started and replied to its first, slow question."""
    checker = MathChecker()
    assert equal(checker, "x^2+1", "1+x^2")
    yield checker
    checker.close()


@pytest.mark.parametrize(
    "hostile",
    [
        "9^{9^{9^{9^9}}}",
        "10^{10^{10}}",
        "(" * 400 + "1" + ")" * 400,
        "99999999999!",
        "\\int_0^1 x^{x^{x^{x^x}}} dx",
        "\x00\ud800",
    ],
)
def test_a_hostile_answer_costs_at_most_its_time_limit(hostile, started_checker):
    """It is not equal within the limit, and the checker answers the next question."""
    checker = started_checker
    checker.limit_s = 1.0
    started = time.monotonic()
    assert not equal(checker, "123456", hostile)
    assert time.monotonic() - started < 5
    checker.limit_s = 20.0
    assert equal(checker, "x^2+1", "1+x^2")


@pytest.mark.slow
def test_a_timeout_is_counted():
    """A stopped worker is a timeout and "not equal", and a new worker replaces it."""
    checker = MathChecker(limit_s=20.0)
    assert equal(checker, "1+x", "x+1")
    checker._process.send_signal(signal.SIGSTOP)
    checker.limit_s = 0.5
    assert not equal(checker, "1+x", "x+1")
    checker.limit_s = 20.0
    assert equal(checker, "1+x", "x+1")
    assert (checker.stats.questions, checker.stats.timeouts, checker.stats.crashes) == (3, 1, 0)
    checker.close()


@pytest.mark.slow
def test_a_worker_that_dies_is_counted_and_replaced():
    """The worker is killed during a question, as by the kernel when memory runs out."""
    checker = MathChecker()
    assert equal(checker, "1", "1.0")
    checker._process.poll = lambda: None
    checker._process.kill()
    checker._process.wait()
    assert not equal(checker, "1", "1.0")
    assert checker.stats.crashes == 1
    assert equal(checker, "1", "1.0")
    checker.close()


def test_eval_problems_are_read(tmp_path):
    """Questions and answers come apart: the Problem that a policy sees has no answer in it."""
    path = tmp_path / "eval.jsonl"
    path.write_text(
        '{"problem_id": "a", "question": "1+1?", "answer": 2, "source": "x"}\n\n'
        '{"problem_id": "b", "question": "half?", "answer": "\\\\frac12", "level": 3}\n'
    )
    first, second = read_eval_problems(path)
    assert (first.problem.problem_id, first.problem.source, first.answer) == ("a", "x", "2")
    assert second.answer == r"\frac12"
    assert not hasattr(first.problem, "answer")
    assert read_answer_keys(path)["a"].answer == "2"


def test_a_number_identifies_a_problem_in_every_file(tmp_path):
    """Problems, answer keys and saved completions share one id, written as a number or a string.

    Both spellings in one file repeat the problem.
    """
    path, saved = tmp_path / "eval.jsonl", tmp_path / "completions.jsonl"
    path.write_text('{"problem_id": 60, "question": "1+1?", "answer": 2}\n')
    saved.write_text('{"problem_id": 60, "text": "\\\\boxed{2}"}\n')
    assert (
        [p.problem.problem_id for p in read_eval_problems(path)]
        == list(read_answer_keys(path))
        == ["60"]
    )
    assert read_completions(saved)[0].problem_id == "60"
    path.write_text('{"problem_id": "60", "question": "?", "answer": 2}\n' + path.read_text())
    with pytest.raises(
        DataFileError, match=r"line 2: .*repeats '60': .*an integer and a string of its digits"
    ):
        read_eval_problems(path)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"question": "q", "answer": "1"}, "line 2: field 'problem_id' is missing"),
        ({"problem_id": "b", "answer": "1"}, "line 2: field 'question' is missing"),
        ({"problem_id": "b", "question": "q"}, "line 2: field 'answer' is missing"),
        ({"problem_id": "b", "question": "q", "answer": True}, "field 'answer' is True"),
        ({"problem_id": "b", "question": "q", "answer": ""}, "field 'answer' is blank"),
        ({"problem_id": 7.0, "question": "q", "answer": "1"}, "field 'problem_id' is 7.0"),
        ({"problem_id": True, "question": "q", "answer": "1"}, "field 'problem_id' is True"),
        ({"problem_id": "a", "question": "q", "answer": "1"}, "repeats 'a'"),
        ({"problem_id": "b", "question": "q", "answer": "1", "source": 1}, "field 'source'"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, row, message):
    """File, line and field are in the message."""
    path = tmp_path / "eval.jsonl"
    path.write_text(
        json.dumps({"problem_id": "a", "question": "q", "answer": "1"}) + "\n" + json.dumps(row)
    )
    with pytest.raises(DataFileError) as caught:
        read_eval_problems(path)
    assert message in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, field, count",
    [("math500", "answer", 500), ("aime24", "answer", 30), ("amc23", "answer", 40)],
)
def test_every_real_key_matches_itself_and_not_the_next(name, field, count):
    """A real key equals itself in another notation, and neighbouring keys do not match."""
    path = DATA / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not here: set SPARK_NEMO_DATA")
    keys = [str(json.loads(line)[field]) for line in path.read_text().splitlines()]
    assert len(keys) == count
    assert all(answer_matches(f" ${key}$.", key) for key in keys)
    sample = keys[:60]
    matches = [answer_matches(a, b) for a, b in pairwise(sample) if a != b]
    assert sum(matches) <= 2


@pytest.mark.parametrize("answer", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_key_that_is_not_a_finite_number_is_rejected(tmp_path, answer):
    """Python reads these from JSON; as the key "nan" it would have made every answer wrong."""
    (tmp_path / "keys.jsonl").write_text(f'{{"problem_id": "p", "answer": {answer}}}\n')
    with pytest.raises(DataFileError, match=r"keys\.jsonl:line 1: field 'answer' .* finite"):
        read_answer_keys(tmp_path / "keys.jsonl")


def test_a_key_of_400_digits_is_kept(tmp_path):
    """Integers are not limited to the range of floats."""
    (tmp_path / "keys.jsonl").write_text(f'{{"problem_id": "p", "answer": {10**400}}}\n')
    assert read_answer_keys(tmp_path / "keys.jsonl")["p"].answer == str(10**400)
