"""Problem files and atomic writes."""

import json
import os

import pytest

from spark_nemo.records import Problem
from spark_nemo.records.problems import read_problems
from spark_nemo.utils.files import write_json_atomic, write_text_atomic


def test_problems_are_read_without_their_answers(tmp_path):
    """Extra fields reach no record: a Problem has nowhere to put an answer, and nothing else is
    returned.
    """
    path = tmp_path / "p.jsonl"
    rows = [
        {"problem_id": "a", "question": "1 + 1?", "answer": "SECRET", "source": "s"},
        {"problem_id": "b", "question": "x\u2028y"},
    ]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n")
    problems = read_problems(path)
    assert problems == [Problem("a", "1 + 1?", "s"), Problem("b", "x\u2028y")]
    assert "SECRET" not in repr(problems)


def test_the_names_that_benchmarks_use_are_read(tmp_path):
    """MATH-500's and AIME's own files are problem files as they are; our own names win where both
    are there.
    """
    path = tmp_path / "p.jsonl"
    rows = [
        {"unique_id": "test/a.json", "problem": "1 + 1?", "answer": "SECRET", "solution": "SECRET"},
        {"id": 60, "problem": "2?"},
        {"idx": 1, "id": 2, "problem_id": "own", "problem": "x", "question": "q"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = read_problems(path)
    assert problems == [Problem("test/a.json", "1 + 1?"), Problem("60", "2?"), Problem("own", "q")]
    assert "SECRET" not in repr(problems)


def test_a_problem_id_may_be_an_integer(tmp_path):
    """Benchmarks number their rows; as text the identifier is the same in every file, whichever way
    it is written.
    """
    path = tmp_path / "p.jsonl"
    path.write_text('{"problem_id": 60, "question": "q"}\n{"problem_id": "x", "question": "r"}\n')
    assert read_problems(path) == [Problem("60", "q"), Problem("x", "r")]


GOOD = b'{"problem_id": "a", "question": "q"}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "p.jsonl: has no rows"),
        (b"\n", "p.jsonl: has no rows"),
        (GOOD + b"\n\n", "p.jsonl:line 2: empty line"),
        (GOOD + b"\n{", "p.jsonl:line 2: not valid JSON"),
        (GOOD + b"\n" + b"[" * 100_000, "p.jsonl:line 2: not valid JSON"),
        (GOOD + b'\n{"problem_id": "\xff"}', "p.jsonl:line 2: not valid JSON"),
        (GOOD + b"\n3", "p.jsonl:line 2: must be a JSON object"),
        (GOOD + b"\n" + GOOD, "p.jsonl:line 2: problem_id 'a' is already on line 1"),
        (
            b'{"problem_id": 1, "question": "q"}\n{"problem_id": "1", "question": "r"}',
            "p.jsonl:line 2: problem_id '1' is already on line 1 "
            "(an integer and a string of its digits are one id)",
        ),
        (
            b'{"question": "q"}',
            "'problem_id' must be a string or an integer, it is missing; the row has question",
        ),
        (
            b'{"problem_id": 3.0, "question": "q"}',
            "p.jsonl:line 1: 'problem_id' must be a string or an integer, not float",
        ),
        (
            b'{"id": true, "question": "q"}',
            "p.jsonl:line 1: 'problem_id' must be a string or an integer, not bool",
        ),
        (
            b'{"problem_id": "a", "question": 3}',
            "p.jsonl:line 1: 'question' must be a string, not int",
        ),
        (b'{"problem_id": "a", "question": " "}', "p.jsonl:line 1: problem 'a'"),
        (b'{"problem_id": "a", "question": "\\ud800"}', "p.jsonl:line 1: 'question' holds half"),
    ],
)
def test_faults_name_file_and_line(tmp_path, content, message):
    """Whatever is wrong with a problem file, one line says where."""
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_problems(path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_atomic_write_replaces_or_leaves_alone(tmp_path, monkeypatch):
    """A write that fails midway leaves the old file and no litter."""
    path = tmp_path / "report.json"
    write_json_atomic(path, {"text": "é", "n": 1})
    assert json.loads(path.read_text()) == {"text": "é", "n": 1}

    def failing_fsync(handle):
        raise OSError("no")

    monkeypatch.setattr(os, "fsync", failing_fsync)
    with pytest.raises(OSError):
        write_text_atomic(path, "new")
    with pytest.raises(ValueError):
        write_json_atomic(path, {"n": float("nan")})
    assert json.loads(path.read_text())["n"] == 1
    assert [item.name for item in tmp_path.iterdir()] == ["report.json"]


def test_atomic_write_keeps_the_text_exactly(tmp_path):
    """No newline translation and a file others may read."""
    path = tmp_path / "t.txt"
    write_text_atomic(path, "a\r\nb\n")
    assert path.read_bytes() == b"a\r\nb\n"
    assert path.stat().st_mode & 0o777 == 0o644
