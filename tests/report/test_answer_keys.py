"""A run's report names the stage runs that read answer keys; made-up files."""

from __future__ import annotations

from pathlib import Path

from example_summary import example_summary

from spark_nemo.report import read_summary, report_page
from spark_nemo.report.collect_summary import answer_key_readers
from spark_nemo.run.compose import compose_config
from spark_nemo.utils.files import write_json_atomic


def run_folder(top: Path, *designs: str, labels: dict[str, bool], shown: bool = False) -> Path:
    write_json_atomic(
        top / "stage1/stats-shard-all.json", {"reference_guided": {"tokens": 1}} if shown else {}
    )
    for method, reads in labels.items():
        write_json_atomic(top / f"stage2/{method}/labels.json", {"reads_answer_keys": reads})
    for design in designs:
        (top / "stage3" / design).mkdir(parents=True)
    return top


def readers(top: Path, *overrides: str) -> dict[str, str]:
    return answer_key_readers(
        [top], compose_config(["+experiment=toy", f"run.dir={top}", *overrides])
    )


def test_every_declared_baseline_is_named_and_nothing_else(tmp_path: Path) -> None:
    """Each of the three ways from an answer to training is found in the run's own files."""
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
    """Labels balanced by ground truth mark their reward model and the policies trained with it."""
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


def test_the_page_states_which_training_read_answer_keys() -> None:
    """The page names the readers or states that there are none; without a record, neither."""
    summary = example_summary()
    assert read_summary(summary).reads_answer_keys is None
    page = report_page(summary)
    assert "Trained on answer keys" not in page and "No training in this run" not in page

    summary["reads_answer_keys"] = {"stage3/rlvr": "the reward is the answer key"}
    page = report_page(summary)
    assert "Trained on answer keys" in page and "No training in this run" not in page
    assert "stage3/rlvr (the reward is the answer key)." in page

    summary["reads_answer_keys"] = {}
    page = report_page(summary)
    assert "Trained on answer keys" not in page and "No training in this run" in page
