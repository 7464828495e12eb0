from __future__ import annotations

from pathlib import Path

import pytest
from world import run


@pytest.fixture(scope="session")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a finished small stage I."""
    folder = tmp_path_factory.mktemp("collected")
    done = run("stage1", folder)
    assert done.returncode == 0, done.stderr
    return folder
