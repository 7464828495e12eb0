"""The study's section: RL variants against RLVR, reward models against step consistency's."""

from __future__ import annotations

import copy

import pytest
from example_summary import example_summary
from studies.study_table import study_section

from spark_nemo.report import SummaryError


def runs(*accuracies: tuple[float, float]) -> dict[int, dict]:
    """One summary a seed, with the accuracies of SPARK and RLVR."""
    by_seed = {}
    for seed, (spark, rlvr) in enumerate(accuracies):
        summary = copy.deepcopy(example_summary())
        summary["seeds"] = [seed]
        summary["stage3"]["accuracy"] |= {"spark": spark, "rlvr": rlvr}
        by_seed[seed] = summary
    return by_seed


def test_an_rl_variant_differs_only_when_its_interval_over_seeds_excludes_zero() -> None:
    """A steady gap of ten points is a difference; the same mean gap with seeds on both sides of
    zero is none.
    """
    steady = study_section(runs((0.8, 0.9), (0.7, 0.8), (0.75, 0.85)), "c")
    mixed = study_section(runs((0.8, 0.9), (0.9, 0.8), (0.5, 0.8)), "c")
    row = "| SPARK, no answer keys | 75.0 ± 12.4 | -10.0 ± 0.0 | 3 | differs |"
    assert row in steady
    assert "| -10.0 ± 49.7 | 3 | does not differ |" in mixed


def test_a_run_without_the_arm_to_compare_with_is_refused() -> None:
    """A table without its reference would compare nothing."""
    summary = copy.deepcopy(example_summary())
    for part in ("accuracy", "accuracy_intervals", "greedy", "curves"):
        summary["stage3"][part].pop("rlvr", None)
    summary["stage3"]["differences"] = {}
    with pytest.raises(SummaryError, match="RLVR"):
        study_section({0: summary}, "c")
