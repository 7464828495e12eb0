"""A run's report says which of its parts read answer keys; made-up files."""

from __future__ import annotations

from pathlib import Path

from example_summary import example_summary

from spark_nemo.config.compose import compose_config
from spark_nemo.report import read_summary, report_page
from spark_nemo.report.collect_summary import answer_key_readers
from spark_nemo.utils.files import write_json_atomic


def run_folder(top: Path, *arms: str, labels: dict[str, bool], shown: bool = False) -> Path:
    write_json_atomic(
        top / "stage1/stats-shard-all.json", {"reference_guided": {"tokens": 1}} if shown else {}
    )
    for method, reads in labels.items():
        write_json_atomic(top / f"stage2/{method}/labels.json", {"reads_answer_keys": reads})
    for arm in arms:
        (top / "stage3" / arm).mkdir(parents=True)
    return top


def readers(top: Path, *overrides: str) -> dict[str, str]:
    return answer_key_readers(
        [top], compose_config(["+experiment=toy", f"run.dir={top}", *overrides])
    )


def test_every_declared_baseline_is_named_and_nothing_else(tmp_path: Path) -> None:
    """Proves each of the three ways an answer may reach training is found in the run's own files."""
    top = run_folder(
        tmp_path,
        "process_aware",
        "random",
        "rlvr",
        shown=True,
        labels={"single": False, "step_consistency": False, "reference_guided": True},
    )
    assert list(readers(top)) == ["stage1", "stage2/reference_guided", "stage3/rlvr"]


def test_a_policy_whose_reward_model_learned_from_answers_is_named_too(tmp_path: Path) -> None:
    """Proves the declaration travels: labels balanced by ground truth, the reward model made of
    them, its policies.
    """
    top = run_folder(
        tmp_path,
        "process_aware",
        "selective",
        "majority",
        "process_aware-prm",
        labels={"single": False, "step_consistency": True, "step_consistency-prm": False},
    )
    found = readers(top)
    assert list(found) == ["stage2/step_consistency", "stage3/process_aware", "stage3/selective"]
    assert "balanced by ground truth" in found["stage2/step_consistency"]


def test_the_page_says_so_either_way(tmp_path: Path) -> None:
    """Proves the words on the page: who read answers, or that nobody did; an old summary cannot
    know and is silent.
    """
    summary = example_summary()
    said = "Reads answer keys</b>, as declared baselines do: stage3/rlvr (the reward is the answer key)."
    page = report_page(
        {**summary, "reads_answer_keys": {"stage3/rlvr": "the reward is the answer key"}}
    )
    assert said in page and "No part of this run read an answer key" not in page
    assert "No part of this run read an answer key" in report_page(
        {**summary, "reads_answer_keys": {}}
    )
    old = {name: value for name, value in summary.items() if name != "reads_answer_keys"}
    assert read_summary(old).reads_answer_keys is None
    assert "Reads answer keys" not in report_page(old) and "No part of this run" not in report_page(
        old
    )
