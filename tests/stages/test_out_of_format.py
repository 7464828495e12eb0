"""A policy that does not know its format causes a warning at the first step."""

import logging

import pytest

from spark_nemo.stages.stage3 import warn_out_of_format


@pytest.mark.parametrize(
    ("metrics", "warned"),
    [({"format_violations": 1.0}, True), ({"format_violations": 0.5}, False), ({}, False)],
)
def test_a_policy_without_the_format_is_warned_of(metrics, warned, caplog):
    """Half of the responses in format is enough to learn the rest, without a warning."""
    with caplog.at_level(logging.WARNING):
        warn_out_of_format(metrics)
    assert ("teach the format first (`spark-nemo sft`)" in caplog.text) == warned
