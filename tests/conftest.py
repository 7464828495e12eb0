"""For every test: one thread, no network, and no subprocess or sleep unless it is marked ``slow``."""

from __future__ import annotations

import os
import subprocess
import time

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# How fast a property test's example runs is the machine's affair.
settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")

MAX_SLEEP_S = 0.05
"""Longest real sleep of a test that is not marked ``slow``."""


@pytest.fixture(autouse=True)
def fast_unless_marked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail a test of ``make test-fast`` that starts a process or sleeps."""
    if any(request.node.get_closest_marker(marker) for marker in ("slow", "sglang")):
        return

    def no_process(self: subprocess.Popen, *_: object, **__: object) -> None:
        raise AssertionError("a test that starts a process must be marked slow")

    def short_sleep(seconds: float, sleep=time.sleep) -> None:
        assert seconds <= MAX_SLEEP_S, "a test that sleeps must be marked slow"
        sleep(seconds)

    monkeypatch.setattr(subprocess.Popen, "__init__", no_process)
    monkeypatch.setattr(time, "sleep", short_sleep)
