"""Every label method from one stage I run on the toy task, and the reach of answer keys."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from spark_nemo.config import LABEL_METHODS, REFERENCE_GUIDED, ConfigError, SparkConfig
from spark_nemo.records import LabelledSolution
from spark_nemo.records.store import RecordStore
from spark_nemo.report.label_scores import label_scores
from spark_nemo.run.compose import compose_config
from spark_nemo.run.run_folder import stage1_folder, stage2_folder
from spark_nemo.stages.stage1 import run_stage1
from spark_nemo.toy.problem_files import write_answers
from spark_nemo.toy.resolve import oracle_for, resolve_toy
from spark_nemo.utils.files import write_text_atomic
from spark_nemo.verification.stage1_critique import build_stage1_critic
from spark_nemo.verification.training_labels import make_labels

SMALL = [
    "data.stage1_problems=toy:stage1:5",
    "stage1.solutions_per_problem=2",
    "stage1.verifications_per_solution=3",
    "stage1.reference_verifications=3",
]


def configured(folder: Path, answers: Path | str = "toy:stage1:5", *more: str) -> SparkConfig:
    return resolve_toy(
        compose_config(
            [
                "+experiment=toy_labels",
                *SMALL,
                f"run.dir={folder}",
                f"stage1.reference_answers={answers}",
                *more,
            ]
        )
    )


def labels(config: SparkConfig, method: str) -> list[dict]:
    return [label.to_json() for label in labels_of(with_method(config, method))]


def labels_of(config: SparkConfig) -> list[LabelledSolution]:
    folder = stage2_folder(config.run, config.stage2.method, config.stage2.variant)
    return make_labels(config, stage1_folder(config.run) / "store", folder)


def with_method(config: SparkConfig, method: str) -> SparkConfig:
    return replace(config, stage2=replace(config.stage2, method=method))


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> SparkConfig:
    """One stage I run with all optional outputs."""
    config = configured(tmp_path_factory.mktemp("labels") / "run")
    run_stage1(config)
    return config


@pytest.mark.slow
def test_every_method_labels_solutions_of_one_run(sampled: SparkConfig) -> None:
    """With the shipped critic each method keeps most solutions, counts the tokens it needs, and is
    scored against the hidden truth. Ten solutions are too few to rank the methods.
    """
    oracle = oracle_for(sampled)
    assert oracle is not None
    scores = label_scores(Path(sampled.run.dir), sampled, oracle)
    assert tuple(scores) == LABEL_METHODS
    for method, each in scores.items():
        assert each.share_kept > 0.5, method
        assert labels(sampled, method)
    assert scores["single"].tokens_per_solution < scores["meta_critique"].tokens_per_solution
    assert (
        scores["step_consistency"].tokens_per_solution < scores["hybrid_step"].tokens_per_solution
    )
    stats = json.loads((Path(sampled.run.dir) / "stage1/stats-shard-all.json").read_text())
    assert stats["reference_guided"]["reads_answer_keys"] == sampled.stage1.reference_answers


@pytest.mark.slow
def test_a_second_run_asks_for_nothing(sampled: SparkConfig) -> None:
    """A second run finds critiques, merges and reference verifications by their keys."""
    run_stage1(sampled)
    stats = json.loads((Path(sampled.run.dir) / "stage1/stats-shard-all.json").read_text())
    assert (
        stats["meta_critique"]["tokens"]
        == stats["reference_guided"]["tokens"]
        == stats["verification_tokens"]
        == 0
    )
    assert stats["meta_critique"]["reused"] > 0


@pytest.mark.slow
def test_poisoned_reference_answers_reach_the_baseline_and_nothing_else(
    sampled: SparkConfig, tmp_path: Path
) -> None:
    """Reference-free labels do not depend on the answer file: with every answer wrong, six methods
    give identical labels, and only the baseline's labels change.
    """
    honest = write_answers("stage1", 5, 0, tmp_path)
    rows = [{**json.loads(line), "answer": "-1"} for line in honest.read_text().splitlines()]
    poisoned = tmp_path / "poisoned.jsonl"
    write_text_atomic(poisoned, "".join(json.dumps(row) + "\n" for row in rows))
    config = configured(tmp_path / "run", poisoned)
    run_stage1(config)
    for method in LABEL_METHODS:
        assert (labels(config, method) == labels(sampled, method)) == (
            method != REFERENCE_GUIDED
        ), method


@pytest.mark.slow
def test_a_method_whose_texts_are_missing_says_what_to_run(tmp_path: Path) -> None:
    """With a store of votes alone, the error of the other methods names the setting to change."""
    config = configured(
        tmp_path,
        "null",
        "stage1.reference_verifications=null",
        "stage1.meta_critique=[]",
        "stage1.revision_sampling.temperature=null",
        "stage1.revision_sampling.max_new_tokens=null",
        "pipeline.label_methods=[single]",
    )
    run_stage1(config)
    for method, fix in (
        ("meta_critique", r"stage1\.meta_critique=\[single\]"),
        ("hybrid_step", r"=\[step_consistency\]"),
        (REFERENCE_GUIDED, r"stage1\.reference_answers"),
    ):
        with pytest.raises(ConfigError, match=fix):
            labels_of(with_method(config, method))


@pytest.mark.slow
def test_what_was_removed_is_written_down(sampled: SparkConfig) -> None:
    """labels.json adds up for both ways of balancing and reports when answers were read. Balancing
    by ground truth keeps as many right as wrong solutions.
    """
    answers = sampled.stage1.reference_answers
    for changes in (
        {"balance": "consensus"},
        {"balance": "ground_truth", "reference_answers": answers},
    ):
        config = replace(sampled, labels=replace(sampled.labels, **changes))
        try:
            kept = labels(config, "step_consistency")
        except ConfigError as error:
            assert "labels.balance=none" in str(error)
            continue
        row = json.loads((Path(config.run.dir) / "stage2/step_consistency/labels.json").read_text())
        assert row["kept"] == len(kept) == row["labelled"] - sum(row["removed"].values())
        assert row["reads_answer_keys"] == (changes["balance"] == "ground_truth")
        if changes["balance"] == "consensus":
            assert 2 * sum(label["answer_correct"] for label in kept) == len(kept)


def test_without_a_critic_the_verifier_criticises_itself_and_nothing_more_is_loaded(
    tmp_path: Path,
) -> None:
    """``models.critic=null`` reuses the verifier's engine; votes alone do not need a critic."""
    verifier = SimpleNamespace(fingerprint="verifier")
    with RecordStore(tmp_path / "store", "writer") as store:
        alone = configured(tmp_path, "toy:stage1:5", "models.critic=null")
        critic = build_stage1_critic(alone, verifier, store, tmp_path)
        assert critic is not None and critic.critic is verifier
        votes_alone = resolve_toy(compose_config(["+experiment=toy", f"run.dir={tmp_path}"]))
        assert build_stage1_critic(votes_alone, verifier, store, tmp_path) is None


def test_an_incomplete_answer_file_is_an_error_before_any_model_is_loaded(tmp_path: Path) -> None:
    """The error names the file, the problems and the number of missing answers."""
    answers = write_answers("stage1", 4, 0, tmp_path)
    with pytest.raises(
        ConfigError, match=r"stage1\.reference_answers=.*: no answer for 1 of data\.stage1_problems"
    ):
        run_stage1(configured(tmp_path / "run", answers))
