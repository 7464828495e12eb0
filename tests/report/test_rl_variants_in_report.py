"""Reward designs and kinds of reward models in summary, page and tables; made-up files."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import asdict
from pathlib import Path

import pytest
from example_summary import curve, example_summary
from studies.results_document import results_markdown

from spark_nemo.config.designs import designs
from spark_nemo.grammar import render_verification
from spark_nemo.grammar.verification import StepJudgement
from spark_nemo.records import (
    SOLUTION,
    VERIFICATION,
    AnswerVerdict,
    ParseFailure,
    Solution,
    Verdict,
    Verification,
    outcome_to_json,
)
from spark_nemo.records.store import RecordStore
from spark_nemo.report import (
    compare_runs,
    comparison_markdown,
    report_page,
)
from spark_nemo.report.collect_summary import collect_summary
from spark_nemo.report.display_names import DESIGN_NAMES, method_name, rl_variant_name
from spark_nemo.run.compose import compose_config
from spark_nemo.utils.files import write_json_atomic, write_text_atomic

CASES = [
    (-1, Verdict((True, True), True)),
    (1, Verdict((True, False), False)),
    (0, Verdict((True, False), False)),
    (-1, Verdict((True, True), False)),
]
ORM_CASES = [
    (-1, AnswerVerdict(True)),
    (1, AnswerVerdict(False)),
    (0, AnswerVerdict(True)),
    (-1, ParseFailure("x")),
]


def evaluation(step: int, value: float) -> dict:
    figure = {"value": value, "low": value, "high": value}
    return {
        "step": step,
        "sampled": figure,
        "greedy": figure,
        "num_tokens": 1,
        "rates": {"p": value},
    }


def write_evaluations(folder: Path, value: float) -> None:
    rows = [json.dumps(evaluation(step, v)) + "\n" for step, v in ((0, 0.5), (2, value))]
    write_text_atomic(folder / "evaluations.jsonl", "".join(rows))


def write_cases(path: Path, cases: list, predicted: bool) -> None:
    rows = []
    for label, outcome in cases:
        row = {"label": label, "outcome": outcome_to_json(outcome)}
        if predicted:
            row["prediction"] = outcome.first_error
        rows.append(row)
    write_json_atomic(path, {"cases": rows})


@pytest.fixture
def summary(tmp_path: Path) -> dict:
    """Summary of a run with four RL variants and two kinds of reward model."""
    for name, value in (
        ("selective-prm", 0.75),
        ("rlvr", 1.0),
        ("process_aware", 0.875),
        ("process_aware-orm", 0.625),
    ):
        write_evaluations(tmp_path / "stage3" / name, value)
    write_cases(tmp_path / "stage2/step_consistency/processbench.json", CASES, True)
    write_cases(tmp_path / "stage2/step_consistency-orm/whole_solution.json", ORM_CASES, False)
    return collect_summary(compose_config(["+experiment=toy", f"run.dir={tmp_path}"]))


def test_every_rl_variant_is_collected_under_its_name(summary: dict) -> None:
    """Process-aware with a PRM-CoT is ``spark``, the others are their folders; RLVR comes last."""
    stage3 = summary["stage3"]
    assert list(stage3["accuracy"]) == [
        "base",
        "spark",
        "process_aware-orm",
        "selective-prm",
        "rlvr",
    ]
    assert stage3["accuracy"]["selective-prm"] == 0.75
    assert {name: f["value"] for name, f in stage3["differences"].items()} == {
        "spark_minus_base": 0.375,
        "spark_minus_process_aware-orm": 0.25,
        "spark_minus_selective-prm": 0.125,
        "spark_minus_rlvr": -0.125,
    }


def test_an_orms_score_is_never_under_f1(summary: dict) -> None:
    """First errors and Yes/No verdicts are two tables, and only the second has the ORM.

    Here the PRM-CoT found both errors and rejected one correct solution. The ORM found one error;
    its unreadable answer is wrong and counted.
    """
    stage2 = summary["stage2"]
    assert set(stage2["methods"]) == {"step_consistency"} and stage2["f1"] == {
        "step_consistency": pytest.approx(2 / 3)
    }
    cot, orm = (
        stage2["whole_solutions"][name] for name in ("step_consistency", "step_consistency-orm")
    )
    assert (cot["verdict_acc_error"]["value"], cot["verdict_acc_correct"]["value"]) == (1.0, 0.5)
    assert (
        orm["verdict_acc_error"]["value"],
        orm["verdict_acc_correct"]["value"],
        orm["unparsed"],
    ) == (0.5, 0.5, 1)


def test_page_and_tables_name_rl_variants_in_words(summary: dict) -> None:
    """A variant's name has its design and its kind of reward model."""
    page = report_page(summary)
    table = results_markdown([summary])
    compared = comparison_markdown(compare_runs([("", summary)]))
    for text in (page, table, compared):
        assert "Selective advantage, PRM" in text and "Process-aware, ORM" in text
    assert "SPARK minus Process-aware, ORM" in page and "Step consistency, ORM" in page
    assert (
        "Yes or No about whole solutions" in page and "Yes or No about whole solutions" in compared
    )
    assert "| first | second |" in compared


def test_every_design_has_a_display_name() -> None:
    """Only the name of rlvr mentions answer keys."""
    assert set(DESIGN_NAMES) == set(designs()) - {"rlvr"}
    assert [name for name in designs() if "with answer keys" in rl_variant_name(name)] == ["rlvr"]
    assert rl_variant_name("min_form-prm") == "Min-form (PURE), PRM"
    assert method_name("single-orm") == "Single verification, ORM"
    assert rl_variant_name("something-else") == "something-else"


def test_a_run_with_an_orm_alone_has_a_page(tmp_path: Path) -> None:
    """F1 is absent from summary, charts and headlines; it is not 0."""
    write_cases(tmp_path / "stage2/step_consistency-orm/whole_solution.json", ORM_CASES, False)
    summary = collect_summary(compose_config(["+experiment=toy", f"run.dir={tmp_path}"]))
    page = report_page(summary)
    assert (
        summary["stage2"]["f1"] == {}
        and "First wrong step found" not in page
        and "Step consistency, ORM" in page
    )


def test_rl_variants_without_a_fixed_colour_differ() -> None:
    """Two of them with curves have two colours."""
    made = example_summary()
    for design in ("selective", "capo"):
        made["stage3"]["accuracy"][design] = 0.5
        made["stage3"]["curves"][design] = curve(0.6, 3, 0.7)
    page = report_page(made)
    assert "#332288" in page and "#009E73" in page


def test_a_report_does_not_hold_the_store(tmp_path: Path) -> None:
    """Peak memory grows by less than a tenth of the size of the additional solutions."""
    peaks, text = [], render_verification([StepJudgement("", "x" * 4000, True)] * 2, True)
    for count in (20, 160):
        folder = tmp_path / str(count)
        with RecordStore(folder / "stage1/store", "w", fsync_every=4096) as store:
            for number in range(count):
                key = f"s{number:04d}"
                store.append(
                    key,
                    SOLUTION,
                    asdict(
                        Solution(
                            key,
                            f"p{number // 2}",
                            "q",
                            "Step 1: x\nStep 2: y\nAnswer: 2",
                            "stop",
                            9,
                        )
                    ),
                )
                for vote in range(8):
                    outcome = (
                        Verdict((True, True), True)
                        if vote
                        else ParseFailure("verdict_missing: none")
                    )
                    record = Verification(f"{key}-{vote}", key, vote, text, outcome, 9)
                    store.append(record.key, VERIFICATION, record.to_json(), parent=key)
        config = compose_config(["+experiment=toy", f"run.dir={folder}"])
        tracemalloc.start()
        found = collect_summary(config)["stage1"]
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert (found["problems"], found["solutions"], found["verifications"]) == (
            count // 2,
            count,
            8 * count,
        )
        assert found["failure_rates"] == {"parse_failure": 0.125}
    assert peaks[1] - peaks[0] < 0.1 * 140 * 8 * len(text), peaks
