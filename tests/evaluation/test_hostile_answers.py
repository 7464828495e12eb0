"""A thousand answers made to hang, exhaust or crash a checker, and the limits of its processes."""

from __future__ import annotations

import logging
import random
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from spark_nemo.evaluation import CheckerPool, answers
from spark_nemo.evaluation.checker import GRACE_S, MEMORY_LIMIT_BYTES, AnswerGrade, MathChecker
from spark_nemo.evaluation.saved_completions import SavedCompletion, score_completions
from spark_nemo.grammar import extract_boxed
from spark_nemo.records import Problem

LIMIT_S, WORKERS, COUNT = 0.3, 3, 1000
MEGABYTE = 1_000_000


def equal(checker, gold, answer):
    """Compare two answers with math-verify in the checker's worker."""
    return checker.grade(gold, answer) is AnswerGrade.EQUAL


def tower(base: int, height: int) -> str:
    return f"{base}^{{" * height + "9" + "}" * height


def hostile_answers() -> list[str]:
    """Return exactly COUNT answers, the same ones every time."""
    rng = random.Random(0)
    digits = "".join(rng.choices("123456789", k=400))
    made = [tower(base, height) for base in (2, 3, 9, 10) for height in (2, 3, 4, 9, 60)]
    made += [f"{10**k + 7}!" for k in range(3, 15)] + ["9" + "!" * k for k in (2, 3, 30, 300)]
    made += [f"{a}^{b}" for a in (9, 99, digits[:90]) for b in (999999, 99999999, digits[:40])]
    made += [
        opening * n + "1" + closing * n
        for n in (10, 60, 150, 190)
        for opening, closing in (
            ("(", ")"),
            ("{", "}"),
            ("[", "]"),
            ("\\sqrt{", "}"),
            ("\\frac{1}{", "}"),
            ("\\left(", "\\right)"),
            ("|", "|"),
            ("\\boxed{", "}"),
            ("-", ""),
            ("\\text{", "}"),
            ("\\begin{pmatrix}", "\\end{pmatrix}"),
        )
    ]
    made += [
        "{" * 50,
        "}" * 50,
        "}{" * 40,
        "\\boxed{5",
        "5}",
        "5} \\boxed{6",
        "\\boxed{\\boxed{5}}",
        "\\{\\}\\{",
        "\\",
    ]
    made += [letter * MEGABYTE for letter in ("9", "(", "\\", "{", " ", "é", "\x00")]
    made += [
        "\\boxed{" * (MEGABYTE // 7),
        "1+" * (MEGABYTE // 2) + "1",
        "\\frac{1}{2}" * (MEGABYTE // 11),
    ]
    made += [
        "\\int_0^1 x^{x^{x^x}} dx",
        "\\sum_{n=1}^{10^{100}} n^{-n}",
        "\\prod_{k=1}^{99999999} k",
        "\\lim_{x \\to 0} \\frac{\\sin(\\sin(\\sin x))}{x^{x^x}}",
        "\\binom{10^9}{5 \\cdot 10^8}",
        "\\sin(10^{10^{10}})",
        "\\log_{0}(0)",
        "\\frac{0}{0}",
        "\\frac{1}{0}^{\\frac{1}{0}}",
        "\\sqrt[0]{1}",
        "\\Gamma(10^{12})",
        "0^0",
        "\\zeta(3)^{\\pi}",
        "\\lfloor 9^{9^9} \\rfloor",
        "1_000",
        "0x10",
        "1e999",
        "x^{y^{z^{x^{y^z}}}} = x",
        "i^{i^{i^{i^i}}}",
        "10^{-10^{10}}",
        "(-1)^{10^{99}/3}",
        "\\infty - \\infty",
        "\\{1, 2, \\ldots, 10^{12}\\}",
        "[0, 10^{99})",
        "(1,2,3) \\cup [4,9!!!]",
        "e^{e^{e^{79}}}",
        "\\begin{pmatrix}" + " & ".join("9^9" for _ in range(100)) + "\\end{pmatrix}^{99}",
        "__import__('os').system('kill 1')",
        "exec('while True: pass')",
        "x" * 900,
        "\\mathrm{" + "a" * 900 + "}",
    ]
    codes = (0, 1, 7, 27, 0x7F, 0x85, 0x202E, 0xFEFF, 0xFF15, 0x661, 0x1D7DC, 0xD800, 0x10FFFF)
    made += [chr(code) * n for code in codes for n in (1, 40)]
    pieces = (
        "\\frac{",
        "\\sqrt{",
        "}",
        "{",
        "^",
        "_",
        "(",
        ")",
        "\\left(",
        "\\right)",
        "x",
        "9",
        "!",
        "\\pi",
        "+",
        "=",
        "\\boxed{",
        "&",
        "\\\\",
        ",",
        " ",
        "\n",
        "\\cdot",
        "|",
        "∑",
        "\\sin",
        "\\in",
        "\\mathbb{R}",
        "%",
    )
    while len(made) < COUNT:
        made.append("".join(rng.choices(pieces, k=rng.choice((3, 8, 20, 60)))))
    return made[:COUNT]


@pytest.fixture(scope="module")
def workers():
    """Three checkers whose workers have started."""
    started = CheckerPool(WORKERS, 60.0)
    with ThreadPoolExecutor(WORKERS) as threads:
        assert all(threads.map(lambda k: equal(started, "1+x", f"x+1+{k}-{k}"), range(WORKERS)))
    yield started
    started.close()


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch, workers: CheckerPool):
    """The workers as the shared checker, with 0.3 seconds for each answer."""
    for each in workers._checkers:
        each.limit_s = LIMIT_S
    monkeypatch.setattr(answers, "shared_checker", lambda: workers)
    answers._math_verify_grade.cache_clear()
    logging.getLogger("spark_nemo.evaluation.checker").setLevel(logging.ERROR)
    yield workers
    logging.getLogger("spark_nemo.evaluation.checker").setLevel(logging.NOTSET)
    answers._math_verify_grade.cache_clear()


@pytest.mark.timeout(300)
def test_a_thousand_hostile_answers_are_each_graded_within_the_limit(
    pool: CheckerPool,
) -> None:
    """None hangs or raises, each costs at most its limit, and only real equalities are equal.

    The pool still works afterwards: every child that was killed has been replaced.
    """
    made, spent, stats = hostile_answers(), [], pool.stats
    assert len(made) == COUNT and sum(len(answer) >= MEGABYTE - 10 for answer in made) >= 10
    golds = ("123456", "\\frac{x^2+1}{7}", "(3, \\frac{\\pi}{2})", "5")

    def grade(place: int) -> AnswerGrade:
        begin = time.monotonic()
        grade = answers.grade_answer(made[place], golds[place % len(golds)])
        spent.append(time.monotonic() - begin)
        return grade

    begin = time.monotonic()
    with ThreadPoolExecutor(WORKERS) as threads:
        grades = list(threads.map(grade, range(COUNT)))
    seconds = time.monotonic() - begin
    assert all(isinstance(grade, AnswerGrade) for grade in grades)
    # The two seconds allow a worker to replace a child on a busy machine.
    assert max(spent) < LIMIT_S + GRACE_S + 2 and seconds < COUNT * LIMIT_S / WORKERS, (
        max(spent),
        seconds,
    )
    assert grades.count(AnswerGrade.EQUAL) <= 5 and grades.count(AnswerGrade.TIMEOUT) >= 20
    assert pool.stats.timeouts - stats.timeouts == grades.count(AnswerGrade.TIMEOUT)
    assert pool.stats.crashes - stats.crashes == grades.count(AnswerGrade.CRASHED)
    for each in pool._checkers:
        each.limit_s = 60.0
    with ThreadPoolExecutor(WORKERS) as threads:
        assert all(threads.map(lambda k: equal(pool, f"x^2+{k}", f"{k}+x^2"), range(2 * WORKERS)))


def test_a_score_counts_the_answers_that_could_not_be_graded(pool: CheckerPool) -> None:
    """They count as wrong and are counted; megabytes of nested boxes are parsed at once."""
    problems = [answers.EvalProblem(Problem(f"p{i}", "?"), "\\sqrt{2}") for i in range(3)]
    nested = "\\boxed{" * 140_000 + "1" + "}" * 140_000
    texts = ["\\boxed{" + tower(9, 5) + "}", nested, "\\boxed{2^{1/2}}"]
    begin = time.monotonic()
    assert len(extract_boxed(nested)) > MEGABYTE and time.monotonic() - begin < 5
    for each in pool._checkers:
        each.limit_s = 3.0
    score = score_completions(
        [SavedCompletion(f"p{i}", 0, True, text) for i, text in enumerate(texts)], problems
    )
    assert score.ungraded == 1 and score.values["greedy pass@1"] == {
        "p0": False,
        "p1": False,
        "p2": True,
    }


ASK_TWICE = """
import os, signal
from spark_nemo.evaluation import checker_worker
from spark_nemo.evaluation.checker import MEMORY_LIMIT_BYTES
real = checker_worker.equivalent
for function in (lambda gold, answer: {harm}, real):
    checker_worker.equivalent = function
    child = checker_worker.Child(MEMORY_LIMIT_BYTES)
    print(child.ask(b'{{"gold": "1+x", "answer": "x+1", "limit_s": 60}}\\n', 60.0))
    child.end()
"""
"""Run a child that does harm and then one that compares, in a process of the supervisor's size.

The test process would not do: after other tests its address space is beyond the child's limit.
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "harm",
    [
        "os.kill(os.getpid(), signal.SIGKILL)",
        "os._exit(0)",
        "bytearray(3 * MEMORY_LIMIT_BYTES // 2) is None",
    ],
    ids=["killed", "exit", "too much memory"],
)
def test_a_child_that_ends_is_a_crash_and_is_replaced(harm: str) -> None:
    """A kill, an exit and too large an allocation are crashes; the next question is graded."""
    done = subprocess.run(
        [sys.executable, "-c", ASK_TWICE.format(harm=harm)], capture_output=True, text=True
    )
    assert done.stdout.split() == ["crashed", "equal"], done.stderr


@pytest.mark.slow
def test_the_memory_of_a_comparing_process_is_limited() -> None:
    """The kernel has the memory limit of the process that parses answers."""
    checker = MathChecker(60.0)
    assert equal(checker, "1+x", "x+1")
    worker = checker._process.pid
    [child] = Path(f"/proc/{worker}/task/{worker}/children").read_text().split()
    assert resource.prlimit(int(child), resource.RLIMIT_AS)[0] == MEMORY_LIMIT_BYTES
    checker.close()
    assert not Path(f"/proc/{worker}").exists()
    deadline = time.monotonic() + 30
    while (
        Path(f"/proc/{child}").exists()
        and "State:\tZ" not in Path(f"/proc/{child}/status").read_text()
    ):
        assert time.monotonic() < deadline, "the child outlives its supervisor"
        time.sleep(0.05)


@pytest.mark.slow
def test_an_interrupted_question_leaves_no_answer_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """After Ctrl-C, the pending reply is not read as the reply to the next question."""
    checker = MathChecker()
    try:
        assert not equal(checker, "1+x", "x+2")

        def interrupted(limit_s: float) -> str:
            raise KeyboardInterrupt

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(checker, "_read_line", interrupted)
            checker.grade("2y", "y+y")  # equal
        assert [equal(checker, "1+x", "x+2"), equal(checker, "1+x", "x+1")] == [False, True]
    finally:
        checker.close()
