"""Evaluation data from Parquet files and Hugging Face datasets; no test needs a network."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from spark_nemo.evaluation import DataFileError, read_math, read_processbench
from spark_nemo.evaluation.hub_datasets import HubName, source_name

ROWS = [{"id": i, "problem": f"{i} + 1?", "answer": str(i + 1)} for i in range(3)]


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    library = pytest.importorskip("datasets")
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return library


def folder_with(path: Path, **splits: list[dict]) -> Path:
    path.mkdir()
    for name, rows in splits.items():
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_parquet_reads_as_jsonl_does(tmp_path: Path) -> None:
    """Parquet gives the same problems as JSONL; a bad row and another kind of file are named."""
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "aime24.parquet")
    (tmp_path / "aime24.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert read_math(tmp_path / "aime24.parquet") == read_math(tmp_path / "aime24.jsonl")
    parquet.write_table(
        pyarrow.Table.from_pylist([*ROWS, {"id": 9, "problem": "9?", "answer": None}]),
        tmp_path / "amc23.parquet",
    )
    with pytest.raises(DataFileError, match=r"amc23.parquet:row 4: field 'answer' is None"):
        read_math(tmp_path / "amc23.parquet")
    (tmp_path / "math500.parquet").write_text("no")
    with pytest.raises(DataFileError, match="cannot be read as parquet"):
        read_math(tmp_path / "math500.parquet")


def test_a_dataset_folder_is_read_through_the_datasets_library(tmp_path: Path, datasets) -> None:
    """The library loads a split by name, and the test split without one; a bad row is named."""
    folder = folder_with(tmp_path / "aime25", train=ROWS[:1], test=ROWS[1:])
    assert [p.problem.problem_id for p in read_math(f"hf:{folder}")] == ["aime25-1", "aime25-2"]
    assert [p.answer for p in read_math(f"hf:{folder}::train")] == ["1"]
    bad = folder_with(tmp_path / "amc23", test=[{"id": 0, "problem": " ", "answer": "1"}])
    with pytest.raises(DataFileError, match=rf"hf:{bad}:row 1: field 'problem' is blank"):
        read_math(f"hf:{bad}")


def test_a_missing_part_of_a_dataset_is_a_one_line_error(tmp_path: Path, datasets) -> None:
    """Several splits, a wrong split, a missing folder or network are one-line errors."""
    folder = folder_with(tmp_path / "aime25", train=ROWS, validation=ROWS)
    for source, message in (
        (f"hf:{folder}", "has the splits train, validation: name one"),
        (f"hf:{folder}::tset", "tset"),
        (f"hf:{tmp_path}/none", "cannot be loaded"),
        ("hf:nobody/nothing-like-it", "name a local JSONL or Parquet"),
        ("hf:", "write hf:owner/name"),
        ("hf:a/b:c:d:e", "write hf:owner/name"),
    ):
        with pytest.raises(DataFileError, match=message) as raised:
            read_math(source, "aime25")
        assert "\n" not in str(raised.value) and source in str(raised.value)


def test_without_the_library_the_package_to_install_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without the optional dependency there is a one-line error, not a traceback."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataFileError, match=r"pip install 'spark-nemo\[hf\]'"):
        read_math("hf:math-ai/aime25")


def test_a_hub_dataset_is_asked_for_by_name_configuration_and_split(
    monkeypatch: pytest.MonkeyPatch, datasets
) -> None:
    """Name, configuration and split reach the library, also for ProcessBench."""
    asked = []
    row = {
        "id": "omnimath-0",
        "generator": "g",
        "problem": "1?",
        "steps": ["a"],
        "final_answer_correct": True,
        "label": -1,
    }

    def load_dataset(name: str, config: str | None, split: str | None):
        asked.append((name, config, split))
        return [row]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_processbench("hf:Qwen/ProcessBench::omnimath")[0].case_id == "omnimath-0"
    read_processbench("hf:Qwen/ProcessBench:default:omnimath")
    assert asked == [
        ("Qwen/ProcessBench", None, "omnimath"),
        ("Qwen/ProcessBench", "default", "omnimath"),
    ]
    assert source_name("hf:Qwen/ProcessBench::omnimath") == "omnimath"
    assert HubName.parse("data/hf.jsonl") is None
