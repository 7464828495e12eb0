"""Which differences in configuration make another run."""

from __future__ import annotations

from dataclasses import asdict

from spark_nemo.config import RLConfig
from spark_nemo.stages.run_folder import comparable_rl


def test_unset_is_the_same_run_as_the_default_written_out() -> None:
    """A folder whose config.yaml or checkpoint says std_normalise=true and token_mean can be resumed by default."""
    unset, written = RLConfig(), RLConfig(std_normalise=True, loss_aggregation="token_mean")
    other = RLConfig(std_normalise=False)
    assert comparable_rl(asdict(unset)) == comparable_rl(asdict(written)) != comparable_rl(asdict(other))
    assert comparable_rl(comparable_rl(asdict(unset))) == comparable_rl(asdict(unset))
