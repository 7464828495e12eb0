"""Mathematics files: their formats, gold answers against themselves, prompts without answers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from spark_nemo.evaluation import (
    CheckerPool,
    DataFileError,
    answer_matches,
    grade_answers,
    read_math,
)
from spark_nemo.evaluation.checker import AnswerGrade
from spark_nemo.evaluation.math_data import BENCHMARKS, benchmark_of, read_math_sets
from spark_nemo.grammar import extract_boxed, normalize_answer
from spark_nemo.records import Problem
from spark_nemo.records.problems import read_problems, read_verl_problems

DATA = (
    Path(os.environ.get("SPARK_NEMO_DATA") or Path(__file__).parents[2].parent / "shared" / "data")
    / "math"
)
COUNTS = {"math500": 500, "aime24": 30, "amc23": 40, "minerva_math": 272, "olympiadbench": 675}
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no mathematics files in {DATA}")

UNDECIDED = {
    "minerva_math-28": "sympy does not finish expanding two nested fractional powers in time",
}
"""Gold answers that math-verify does not find equal to themselves; in use, equal text is enough."""


@needs_data
def test_the_five_files_load() -> None:
    """Row counts are the published ones; all 1,517 problems have an identifier and an answer."""
    loaded = {name: read_math(DATA / f"{name}.jsonl") for name in COUNTS}
    assert {name: len(problems) for name, problems in loaded.items()} == COUNTS
    flat = [p for problems in loaded.values() for p in problems]
    assert len({p.problem.problem_id for p in flat}) == 1517
    assert all(p.answer.strip() for p in flat)


@needs_data
def test_a_completion_that_boxes_the_gold_answer_is_right() -> None:
    """100 % on all five files: parsing the box loses nothing of any gold answer."""
    pairs = [
        (extract_boxed(f"Thus \\boxed{{{p.answer}}}."), p.answer)
        for name in COUNTS
        for p in read_math(DATA / f"{name}.jsonl")
    ]
    assert grade_answers(pairs) == [AnswerGrade.EQUAL] * 1517


@pytest.mark.slow
@needs_data
@pytest.mark.timeout(300)
def test_math_verify_itself_finds_gold_answers_equal_to_themselves() -> None:
    """math-verify parses every gold answer that is not a plain number, but for the few listed.

    The short cut for equal text is bypassed: it would hide answers that math-verify cannot parse.
    """
    problems = [
        p
        for name in COUNTS
        for p in read_math(DATA / f"{name}.jsonl")
        if not re.fullmatch(r"-?\d+(\.\d*)?", p.answer)
    ]
    assert len(problems) > 400
    keys = [normalize_answer(p.answer) for p in problems]
    pool = CheckerPool(4)
    try:
        with ThreadPoolExecutor(4) as threads:
            grades = list(threads.map(pool.grade, keys, keys))
    finally:
        pool.close()
    unequal = {
        p.problem.problem_id for p, grade in zip(problems, grades) if grade is not AnswerGrade.EQUAL
    }
    assert unequal <= UNDECIDED.keys()


@needs_data
def test_skywork_prompts_come_without_answers() -> None:
    """8,000 questions load without the answer column; no record has a field for an answer."""
    pytest.importorskip("pyarrow")
    problems = read_verl_problems(DATA / "skywork_math_8k.parquet")
    assert len(problems) == len({p.problem_id for p in problems}) == 8000
    assert all(set(p.__slots__) == {"problem_id", "question", "source"} for p in problems[:1])
    assert not any("ground_truth" in p.question for p in problems)


def write(folder: Path, name: str, *rows: object) -> Path:
    path = folder / f"{name}.jsonl"
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    )
    return path


GOOD = {
    "math500": {"unique_id": "test/a.json", "problem": "1+1?", "answer": "2"},
    "aime24": {"id": 60, "problem": "1+1?", "answer": "002"},
    "aime25": {"problem_idx": 3, "problem": "1+1?", "answer": 2},
    "amc23": {"id": 0, "problem": "1+1?", "answer": 2.0},
    "minerva_math": {"idx": 0, "problem": "1+1?", "solution": "first \\boxed{3}, no: \\boxed{2}"},
    "olympiadbench": {"id": 1, "question": "1+1?", "final_answer": ["$2$"]},
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_format_reads_its_question_and_answer(tmp_path: Path, name: str) -> None:
    """Each format is read from one made-up row, so the test does not need the data files."""
    [problem] = read_math(write(tmp_path, name, GOOD[name]))
    assert problem.problem.question == "1+1?" and problem.problem.source == name
    assert answer_matches("2", problem.answer) and not answer_matches("3", problem.answer)


def test_another_file_name_needs_the_benchmark_or_our_own_fields(tmp_path: Path) -> None:
    """A renamed file is read by naming its benchmark; the package's own format needs no name."""
    renamed = write(tmp_path, "copy", GOOD["amc23"])
    assert read_math(renamed, "amc23")[0].answer == "2"
    with pytest.raises(DataFileError, match="line 1: field 'problem_id' is missing"):
        read_math(renamed)
    own = write(tmp_path, "mine", {"problem_id": "a", "question": "1+1?", "answer": 2})
    assert read_math(own)[0].problem.problem_id == "a"
    with pytest.raises(ValueError, match="known are"):
        read_math(own, "gsm8k")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("math500", {"answer": None}, "field 'answer' is None"),
        ("math500", {"problem": "  "}, "field 'problem' is blank"),
        ("aime24", {"answer": True}, "field 'answer' is True"),
        ("aime24", {"id": None}, "field 'id' is None"),
        ("amc23", {"answer": ""}, "field 'answer' is blank"),
        ("amc23", {"answer": 1e300}, "field 'answer' is '1e+300'"),
        ("amc23", {"answer": float("nan")}, "field 'answer' is 'nan'"),
        ("minerva_math", {"solution": "no box"}, "field 'solution' has no"),
        ("olympiadbench", {"final_answer": []}, "field 'final_answer' must be"),
        ("olympiadbench", {"final_answer": ["2", "3"]}, "field 'final_answer' must be"),
        ("olympiadbench", {"final_answer": [None]}, "field 'final_answer' is None"),
    ],
)
def test_a_malformed_row_is_named_with_file_line_and_field(
    tmp_path: Path, name: str, change: dict[str, object], message: str
) -> None:
    """The error names the second line, where the fault is."""
    path = write(tmp_path, name, GOOD[name], {**GOOD[name], next(iter(GOOD[name])): 7, **change})
    with pytest.raises(DataFileError) as raised:
        read_math(path)
    assert f"{path}:line 2: {message}" in str(raised.value)


@pytest.mark.parametrize("name", GOOD)
def test_a_repeated_identifier_is_rejected(tmp_path: Path, name: str) -> None:
    """Two rows with one identifier are an error, not one problem."""
    id_field = next(iter(GOOD[name]))
    with pytest.raises(DataFileError, match=f"line 2: field '{id_field}' repeats"):
        read_math(write(tmp_path, name, GOOD[name], GOOD[name]))


@pytest.mark.parametrize(
    "row",
    [
        {"ID": "2024-I-4", "Problem": "1+1?", "Solution": "so \\boxed{9}", "Answer": 2},
        {"question": "1+1?", "answer": "2", "solution": "so \\boxed{9}"},
        {"id": "0", "problem": "1+1?", "expected_answer": "2"},
        {"idx": 0, "question": "1+1?", "final_answer": "$2$"},
        {"problem": "1+1?", "solution": "so \\boxed{2}"},
    ],
)
def test_the_column_names_of_the_public_datasets_are_read(
    tmp_path: Path, row: dict[str, object]
) -> None:
    """All column names in use are read, and an answer column goes before a worked solution.

    A problem without an identifier keeps its made-up one when the rows change places.
    """
    other = {
        **row,
        **{key: "1+2?" for key in row if key.lower() in ("problem", "question")},
        **{key: f"{value}x" for key, value in row.items() if key.lower() in ("id", "idx")},
    }
    first = read_math(write(tmp_path, "aime24", row, other))
    second = read_math(write(tmp_path, "aime24", other, row))
    assert first == second[::-1] and len(first) == 2
    assert first[0].problem.question == "1+1?" and answer_matches("2", first[0].answer)


@pytest.mark.parametrize(
    ("source", "benchmark"),
    [
        ("MATH-500.parquet", "math500"),
        ("x/AIME_2025.jsonl", "aime25"),
        ("hf:math-ai/aime25", "aime25"),
        ("hf:HuggingFaceH4/MATH-500::test", "math500"),
        ("hf:opencompass/AIME2025:AIME2025-I", "aime25"),
        ("hf:math-ai/minervamath", "minerva_math"),
        ("hf:some/sets::olympiadbench", "olympiadbench"),
        ("test-00000-of-00001.parquet", None),
        ("hf:AI-MO/aimo-validation-amc", None),
    ],
)
def test_the_benchmark_is_recognised_by_the_name_of_a_file_or_dataset(
    source: str, benchmark: str | None
) -> None:
    """Usual spellings are recognised; other names are not guessed, --benchmark is for them."""
    assert benchmark_of(source) == benchmark


def test_sets_of_an_unusual_size_are_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The 83-problem AMC, another set, is named; a whole AMC and an own set are not."""
    rows = [{"id": i, "problem": f"{i}?", "answer": float(i)} for i in range(83)]
    own = write(tmp_path, "mine", {"problem_id": "a", "question": "1+1?", "answer": 2})
    assert list(read_math_sets([write(tmp_path, "amc23", *rows[:40]), own])) == ["amc23", "mine"]
    assert not caplog.records
    read_math_sets([write(tmp_path, "amc23", *rows)])
    assert "not the 40" in caplog.text
    read_math_sets([write(tmp_path, "amc23", *rows[:7])])
    assert "7 problems, where published figures are over 40" in caplog.text


def test_two_files_of_one_benchmark_are_joined_and_a_shared_problem_is_rejected(
    tmp_path: Path,
) -> None:
    """AIME 2025's two papers make one set."""
    for name, rows in (("one", range(2)), ("two", range(2, 4))):
        (tmp_path / name).mkdir()
        write(tmp_path / name, "aime25", *({"question": f"{i}?", "answer": i} for i in rows))
    sources = [tmp_path / name / "aime25.jsonl" for name in ("one", "two")]
    assert {name: len(rows) for name, rows in read_math_sets(sources).items()} == {"aime25": 4}
    with pytest.raises(DataFileError, match="is in another file"):
        read_math_sets([sources[0], sources[0]])


@pytest.mark.slow
def test_the_tool_writes_prompts_that_stage_one_reads_and_no_answer(tmp_path: Path) -> None:
    """Skywork's Parquet file becomes data.stage1_problems without its marked answer."""
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    parquet.write_table(
        pyarrow.table(
            {
                "data_source": ["aops"],
                "prompt": [
                    [{"role": "system", "content": "s"}, {"role": "user", "content": "1+1?"}]
                ],
                "reward_model": [{"ground_truth": "SECRET"}],
            }
        ),
        tmp_path / "in.parquet",
    )
    tool = Path(__file__).parents[2] / "tools/skywork_prompts.py"
    subprocess.run(
        [sys.executable, tool, tmp_path / "in.parquet", tmp_path / "out.jsonl"],
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert read_problems(tmp_path / "out.jsonl") == [Problem("skywork-0", "1+1?", "aops")]
    assert "SECRET" not in (tmp_path / "out.jsonl").read_text()


def test_a_parquet_file_without_prompts_is_named(tmp_path: Path) -> None:
    """The error names the column or row, and a text file is rejected."""
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    (tmp_path / "text.parquet").write_text("no")
    with pytest.raises(DataFileError, match="cannot be read as parquet"):
        read_verl_problems(tmp_path / "text.parquet")
    parquet.write_table(pyarrow.table({"data_source": ["a"]}), tmp_path / "short.parquet")
    with pytest.raises(DataFileError, match="column 'prompt' is missing"):
        read_verl_problems(tmp_path / "short.parquet")
    rows = [[{"role": "user", "content": "1+1?"}], [{"role": "system", "content": "be brief"}]]
    parquet.write_table(
        pyarrow.table({"data_source": ["a", "b"], "prompt": rows}), tmp_path / "one.parquet"
    )
    with pytest.raises(DataFileError, match="row 2: field 'prompt' has no user message"):
        read_verl_problems(tmp_path / "one.parquet")
