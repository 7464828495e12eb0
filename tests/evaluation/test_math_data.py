"""The mathematics files: loading in their own formats, gold answers against themselves, prompts without answers."""

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
    normalise_answer,
    read_math,
    read_skywork_prompts,
)
from spark_nemo.evaluation.math_data import FORMATS
from spark_nemo.grammar import extract_boxed
from spark_nemo.records import Problem
from spark_nemo.records.jsonl import read_problems

DATA = Path(os.environ.get("SPARK_NEMO_DATA") or Path(__file__).parents[2].parent / "shared" / "data") / "math"
COUNTS = {"math500": 500, "aime24": 30, "amc23": 40, "minerva_math": 272, "olympiadbench": 675}
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no mathematics files in {DATA}")

UNDECIDED = {
    "minerva_math-28": "two nested fractional powers: sympy does not finish expanding them within the time limit",
}
"""Gold answers that math-verify does not find equal to themselves; equal text is accepted before it is asked."""


@needs_data
def test_the_five_files_load() -> None:
    """Proves the row counts, and that every problem of the 1,517 has its own identifier, a question and an answer."""
    loaded = {name: read_math(DATA / f"{name}.jsonl") for name in COUNTS}
    assert {name: len(problems) for name, problems in loaded.items()} == COUNTS
    flat = [p for problems in loaded.values() for p in problems]
    assert len({p.problem.problem_id for p in flat}) == 1517
    assert all(p.answer.strip() for p in flat)


@needs_data
def test_a_completion_that_boxes_the_gold_answer_is_right() -> None:
    """Proves 100 % on all five files with no exception: reading the box loses nothing of any gold answer."""
    pairs = [(extract_boxed(f"Thus \\boxed{{{p.answer}}}."), p.answer)
             for name in COUNTS for p in read_math(DATA / f"{name}.jsonl")]
    assert grade_answers(pairs) == [True] * 1517


@needs_data
@pytest.mark.timeout(300)
def test_math_verify_itself_finds_gold_answers_equal_to_themselves() -> None:
    """Proves the symbolic path parses every gold answer that is no plain number, but for the few listed. The short cut
    for equal text is not used here, which would hide answers that math-verify cannot read."""
    problems = [p for name in COUNTS for p in read_math(DATA / f"{name}.jsonl")
                if not re.fullmatch(r"-?\d+(\.\d*)?", p.answer)]
    assert len(problems) > 400
    pool = CheckerPool(4)
    try:
        with ThreadPoolExecutor(4) as threads:
            equal = list(threads.map(lambda p: pool.equivalent(*[normalise_answer(p.answer)] * 2), problems))
    finally:
        pool.close()
    assert {p.problem.problem_id for p, same in zip(problems, equal) if not same} <= UNDECIDED.keys()


@needs_data
def test_skywork_prompts_come_without_answers() -> None:
    """Proves 8,000 questions load and that the answer column is not even read: no record has a field for one."""
    pytest.importorskip("pyarrow")
    problems = read_skywork_prompts(DATA / "skywork_math_8k.parquet")
    assert len(problems) == len({p.problem_id for p in problems}) == 8000
    assert all(set(p.__slots__) == {"problem_id", "question", "source"} for p in problems[:1])
    assert not any("ground_truth" in p.question for p in problems)


def write(folder: Path, name: str, *rows: object) -> Path:
    path = folder / f"{name}.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


GOOD = {
    "math500": {"unique_id": "test/a.json", "problem": "1+1?", "answer": "2"},
    "aime24": {"id": 60, "problem": "1+1?", "answer": "002"},
    "amc23": {"id": 0, "problem": "1+1?", "answer": 2.0},
    "minerva_math": {"idx": 0, "problem": "1+1?", "solution": "first \\boxed{3}, no: \\boxed{2}"},
    "olympiadbench": {"id": 1, "question": "1+1?", "final_answer": ["$2$"]},
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_reads_its_question_and_answer(tmp_path: Path, name: str) -> None:
    """Proves each format on one row made up here, so also without the data files."""
    [problem] = read_math(write(tmp_path, name, GOOD[name]))
    assert problem.problem.question == "1+1?" and problem.problem.source == name
    assert answer_matches("2", problem.answer) and not answer_matches("3", problem.answer)


def test_another_file_name_needs_the_benchmark_or_our_own_fields(tmp_path: Path) -> None:
    """Proves a renamed file can be read by naming its benchmark, and that our own format needs no name."""
    renamed = write(tmp_path, "copy", GOOD["amc23"])
    assert read_math(renamed, "amc23")[0].answer == "2"
    with pytest.raises(DataFileError, match="line 1: field 'problem_id' is missing"):
        read_math(renamed)
    own = write(tmp_path, "mine", {"problem_id": "a", "question": "1+1?", "answer": 2})
    assert read_math(own)[0].problem.problem_id == "a"
    with pytest.raises(ValueError, match="known are"):
        read_math(own, "gsm8k")


@pytest.mark.parametrize(("name", "change", "message"), [
    ("math500", {"answer": None}, "field 'answer' is None"),
    ("math500", {"problem": "  "}, "field 'problem' is blank"),
    ("aime24", {"answer": 2}, "field 'answer' is 2"),
    ("aime24", {"id": None}, "field 'id' is None"),
    ("amc23", {"answer": "2"}, "field 'answer' is '2'"),
    ("amc23", {"answer": float("nan")}, "field 'answer' is 'nan'"),
    ("minerva_math", {"solution": "no box"}, "field 'solution' has no"),
    ("olympiadbench", {"final_answer": []}, "field 'final_answer' must be"),
    ("olympiadbench", {"final_answer": "2"}, "field 'final_answer' is '2'"),
])
def test_a_malformed_row_is_named_with_file_line_and_field(
    tmp_path: Path, name: str, change: dict[str, object], message: str
) -> None:
    """Proves the error names the second line, where the fault is."""
    path = write(tmp_path, name, GOOD[name], {**GOOD[name], **{"id": 7, "idx": 7, "unique_id": "b"}, **change})
    with pytest.raises(DataFileError) as raised:
        read_math(path)
    assert f"{path}:line 2: {message}" in str(raised.value)


@pytest.mark.parametrize("name", FORMATS)
def test_a_repeated_identifier_is_refused(tmp_path: Path, name: str) -> None:
    """Proves two rows with one identifier would not silently become one problem."""
    with pytest.raises(DataFileError, match=f"line 2: field '{FORMATS[name].id_field}' repeats"):
        read_math(write(tmp_path, name, GOOD[name], GOOD[name]))


def test_the_tool_writes_prompts_that_stage_one_reads_and_no_answer(tmp_path: Path) -> None:
    """Proves the way from Skywork's parquet to data.stage1_problems; the answer in the file here is a marked one."""
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    parquet.write_table(pyarrow.table({
        "data_source": ["aops"], "prompt": [[{"role": "system", "content": "s"}, {"role": "user", "content": "1+1?"}]],
        "reward_model": [{"ground_truth": "SECRET"}]}), tmp_path / "in.parquet")
    tool = Path(__file__).parents[2] / "tools/skywork_prompts.py"
    subprocess.run([sys.executable, tool, tmp_path / "in.parquet", tmp_path / "out.jsonl"], check=True, env={
        **os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert read_problems(tmp_path / "out.jsonl") == [Problem("skywork-0", "1+1?", "aops")]
    assert "SECRET" not in (tmp_path / "out.jsonl").read_text()


def test_a_parquet_file_without_prompts_is_named(tmp_path: Path) -> None:
    """Proves the column or row at fault is named, and that text is not taken for parquet."""
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    (tmp_path / "text.parquet").write_text("no")
    with pytest.raises(DataFileError, match="cannot be read as parquet"):
        read_skywork_prompts(tmp_path / "text.parquet")
    parquet.write_table(pyarrow.table({"data_source": ["a"]}), tmp_path / "short.parquet")
    with pytest.raises(DataFileError, match="column 'prompt' is missing"):
        read_skywork_prompts(tmp_path / "short.parquet")
    rows = [[{"role": "user", "content": "1+1?"}], [{"role": "system", "content": "be brief"}]]
    parquet.write_table(pyarrow.table({"data_source": ["a", "b"], "prompt": rows}), tmp_path / "one.parquet")
    with pytest.raises(DataFileError, match="row 2: field 'prompt' has no user message"):
        read_skywork_prompts(tmp_path / "one.parquet")
