"""Settings of labels: valid values, settings without effect, and outputs of stage I that a method
needs.
"""

from __future__ import annotations

import pytest

from spark_nemo.config import ConfigError, LabelsConfig, PipelineConfig
from spark_nemo.run.compose import compose_config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stage1.meta_critique=[best]", "stage1.meta_critique='best': choose one of"),
        ("stage1.meta_critique=[single,single]", "name each only once"),
        (
            "stage1.revision_sampling.temperature=0.5",
            "stage1.revision_sampling.temperature=0.5 has no effect",
        ),
        ("stage1.reference_verifications=4", "without stage1.reference_answers"),
        (
            "stage1.reference_answers=toy:stage1:240",
            "pipeline.label_methods has reference_guided: remove it",
        ),
        ("labels.reference_pick=single", "pipeline.label_methods has reference_guided: remove it"),
        ("pipeline.label_methods=[meta_critique]", "add single to stage1.meta_critique"),
        ("pipeline.label_methods=[hybrid_step]", "add step_consistency to stage1.meta_critique"),
        ("pipeline.label_methods=[reference_guided]", "set stage1.reference_answers"),
        ("labels.balance=ground_truth", "needs labels.reference_answers"),
        ("labels.reference_answers=toy:stage1:240", "with labels.balance=none"),
        ("labels.max_per_verdict=2", "with labels.balance=none"),
        ("labels.ties=maybe", "labels.ties='maybe'"),
        ("labels.min_agreement=2", "labels.min_agreement=2"),
        ("stage2.method=best", "stage2.method='best'"),
    ],
)
def test_a_setting_that_nothing_would_read_is_an_error(override: str, message: str) -> None:
    """In the toy task's configuration, balance is off and no critic is used."""
    with pytest.raises(ConfigError) as raised:
        compose_config(["+experiment=toy", override])
    assert message in str(raised.value)


ONLY = "stage2.method={0} pipeline.label_methods=[{0}] ".format


@pytest.mark.parametrize(
    ("methods", "override"),
    [
        (ONLY("single"), "labels.ties=incorrect"),
        (ONLY("single"), "labels.no_match=hamming"),
        (ONLY("single"), "labels.require_consistent_verdict=false"),
        (ONLY("outcome_consistency"), "labels.no_match=hamming"),
        (ONLY("outcome_consistency"), "labels.require_consistent_verdict=false"),
        (ONLY("meta_critique") + "stage1.meta_critique=[single]", "labels.ties=incorrect"),
        (
            ONLY("hybrid_outcome") + "stage1.meta_critique=[outcome_consistency]",
            "labels.no_match=hamming",
        ),
    ],
)
def test_a_rule_that_no_method_reads_is_an_error(methods: str, override: str) -> None:
    """Only some vote methods read the rules for ties, missing matches and the verdict."""
    with pytest.raises(ConfigError, match=rf"{override} has no effect with these label methods"):
        compose_config([*methods.split(), override])


@pytest.mark.parametrize(
    ("methods", "override"),
    [
        (ONLY("outcome_consistency"), "labels.ties=incorrect"),
        (ONLY("step_consistency"), "labels.no_match=hamming"),
        (ONLY("step_consistency"), "labels.require_consistent_verdict=false"),
        (
            ONLY("meta_critique") + "stage1.meta_critique=[single]",
            "labels.require_consistent_verdict=false",
        ),
        (ONLY("single") + "stage1.meta_critique=[step_consistency]", "labels.no_match=hamming"),
        (ONLY("reference_guided") + "stage1.reference_answers=a.jsonl", "labels.ties=incorrect"),
        ("stage2.method=single", "labels.no_match=hamming"),
    ],
)
def test_a_rule_that_some_method_reads_is_accepted(methods: str, override: str) -> None:
    """By the choice for a critique, by the reference-guided choice, or by one method of several."""
    name, _, value = override.removeprefix("labels.").partition("=")
    accepted = getattr(compose_config([*methods.split(), override]).labels, name)
    assert str(accepted).lower() == value


def test_a_limit_per_problem_would_break_the_balance() -> None:
    """The error names the limit to use instead."""
    with pytest.raises(ConfigError, match=r"labels\.max_per_verdict, which keeps the balance"):
        LabelsConfig(max_per_problem=4)


def test_the_defaults_are_the_arguments_of_the_docstrings() -> None:
    """Balance by consensus is the default, with three labels of each verdict and no answer keys;
    the pipeline's methods are the three by votes; not set means greedy critiques and 8 reference
    verifications.
    """
    config = compose_config([])
    assert (
        config.labels.balance,
        config.labels.reference_answers,
        config.stage1.meta_critique,
    ) == (
        "consensus",
        None,
        [],
    )
    assert PipelineConfig().label_methods == ["single", "outcome_consistency", "step_consistency"]
    assert (config.stage1.revised_with.temperature, config.stage1.revised_with.max_new_tokens) == (
        0.0,
        8192,
    )
    assert config.stage1.num_reference_verifications == 8


def test_every_method_together_is_one_experiment() -> None:
    """Checks that conf/experiment/toy_labels.yaml is valid without overrides."""
    config = compose_config(["+experiment=toy_labels"])
    assert len(config.pipeline.label_methods) == 7 and len(config.stage1.meta_critique) == 3
