"""Fingerprints of settings and files, and the check that compares two of them."""

from dataclasses import dataclass, field

import pytest

from spark_nemo.config import ConfigError
from spark_nemo.records.fingerprint import (
    check_same_fingerprint,
    content_fingerprint,
    settings_fingerprint,
)


@dataclass
class Inner:
    """A section of settings."""

    rate: float = 0.1
    names: tuple[str, ...] = ("a",)


@dataclass
class Outer:
    """A configuration."""

    data: str = ""
    inner: Inner = field(default_factory=Inner)


def test_a_section_stands_for_its_settings():
    """Proves that a section's name covers every setting below it, under its dotted name."""
    assert settings_fingerprint(Outer(), ["inner"]) == {"inner.rate": 0.1, "inner.names": ["a"]}


def test_a_file_counts_by_its_content(tmp_path):
    """Proves that a copy of a file is the same, and an edited file is not."""
    first, copy, edited = (tmp_path / name for name in ("first", "copy", "edited"))
    first.write_text("same")
    copy.write_text("same")
    edited.write_text("other")
    made = [settings_fingerprint(Outer(str(path)), ["data"]) for path in (first, copy, edited)]
    assert made[0] == made[1] != made[2]


def test_a_store_grows_into_another(tmp_path):
    """Proves that a record store with more in it has another fingerprint, and a folder has none."""
    assert content_fingerprint(tmp_path) is None
    (tmp_path / "all.records").write_text("one\n")
    before = content_fingerprint(tmp_path)
    (tmp_path / "all.records").write_text("one\ntwo\n")
    assert before is not None and content_fingerprint(tmp_path) != before


@pytest.mark.parametrize(
    ("now", "message"),
    [
        ({"seed": 0, "inner": {"rate": 0.2}}, "inner.rate=0.2: .* was made with inner.rate=0.1;"),
        ({"seed": 0}, "inner.rate=<not set>: .* with inner.rate=0.1;"),
        ({"seed": 0, "inner": {"rate": 0.1}, "more": 1}, "more=1: .* with more=<not set>;"),
    ],
)
def test_the_first_difference_is_named(now, message):
    """Proves that the error names the setting with both values, also one that only one side has."""
    with pytest.raises(ConfigError, match=message):
        check_same_fingerprint({"seed": 0, "inner": {"rate": 0.1}}, now, "RUN")


def test_values_are_compared_as_json():
    """Proves that what was read back from a JSON file equals what was written."""
    check_same_fingerprint({"names": ["a"], "a.b": 1}, {"names": ("a",), "a": {"b": 1}}, "RUN")
