"""Invalid or unread weight-sync settings are errors that name the field."""

import pytest

from spark_nemo.config import ConfigError, SparkConfig, WeightSyncConfig
from spark_nemo.run.compose import compose_config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"transport": "nccl"}, "weight_sync.transport='nccl': choose one of disk, distributed"),
        ({"checksums": "maybe"}, "weight_sync.checksums='maybe'"),
        ({"bucket_mb": 0}, "weight_sync.bucket_mb=0: must be at least 1"),
        ({"timeout_s": 0}, "weight_sync.timeout_s=0: must be positive"),
        ({"max_mean_mismatch": 0.0}, "weight_sync.max_mean_mismatch=0.0: must be positive"),
    ],
)
def test_illegal_values(settings, message):
    """Each error names the field and the valid values."""
    with pytest.raises(ConfigError, match=message):
        WeightSyncConfig(**settings)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (
            "local",
            {"transport": "disk"},
            "weight_sync.transport=disk does not fit engine.kind=local",
        ),
        (
            "sglang",
            {"transport": "in_process"},
            "weight_sync.transport=in_process does not fit engine.kind=sglang",
        ),
        ("local", {"bucket_mb": 4}, "weight_sync.bucket_mb=4 has no effect"),
        ("sglang", {"transport": "tensor", "folder": "x"}, "weight_sync.folder=x has no effect"),
    ],
)
def test_transports_and_knobs_that_do_not_fit_the_engine(kind, settings, message):
    """The embedded engine does not use files or buckets; servers do not support in_process."""
    with pytest.raises(ConfigError, match=message):
        WeightSyncConfig(**settings).check_engine(kind)


def test_defaults_follow_the_engine():
    """in_process for the embedded engine, disk for servers; Hydra composes the section like any
    other.
    """
    assert WeightSyncConfig().transport_for("local") == "in_process"
    assert WeightSyncConfig().transport_for("sglang") == "disk"
    assert SparkConfig().weight_sync.bucket_bytes == 512 << 20
    assert (
        compose_config(["weight_sync.max_token_mismatch=0.5"]).weight_sync.max_token_mismatch == 0.5
    )
    with pytest.raises(
        ConfigError, match=r"weight_sync\.transport=disk does not fit engine\.kind=local"
    ):
        compose_config(["weight_sync.transport=disk"])
