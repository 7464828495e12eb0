"""Locks of the images: they have the packages that the project and its presets need.

Building the images, and whether their packages work together, is not tested.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

REPO = Path(__file__).resolve().parents[2]


def names(lines: list[str]) -> set[str]:
    """Normalised package names at the beginning of requirement lines that count on Linux x86-64
    with Python 3.11.
    """
    asked = [
        line
        for line in lines
        if line
        and not line.startswith("#")
        and 'python_version < "3.11"' not in line
        and 'platform_machine == "aarch64"' not in line
    ]
    return {re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in asked}  # type: ignore[index]


def locked(image: str) -> set[str]:
    return names((REPO / f"containers/{image}.lock").read_text().splitlines())


@pytest.mark.parametrize("image", ["trainer", "rollout"])
def test_a_lock_has_every_package_of_its_input(image: str) -> None:
    """Every package of the .in file is in the lock: images install only the lock's lines."""
    assert names((REPO / f"containers/{image}.in").read_text().splitlines()) <= locked(image)


def test_the_trainers_lock_has_what_the_project_imports() -> None:
    """Core dependencies, and those of Parquet: a job has no network to install them from."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    assert names(project["dependencies"] + project["optional-dependencies"]["parquet"]) <= locked(
        "trainer"
    )


def test_the_rollout_lock_has_the_router_of_the_preset() -> None:
    """``+engine=sglang`` starts sglang-router, which SGLang does not depend on."""
    preset = yaml.safe_load((REPO / "conf/engine/sglang.yaml").read_text())["engine"]
    assert preset["policy"]["router"] and preset["verifier"]["router"]
    assert {"sglang-router", "torch", "transformers"} <= locked("rollout")


def test_stages_that_launch_servers_find_them_in_the_trainers_image() -> None:
    """Stage I runs in the trainer's image: SGLang's environment is there under the path that the
    rollout image has.
    """
    trainer, rollout = (
        (REPO / f"containers/Dockerfile.{image}").read_text() for image in ("trainer", "rollout")
    )
    folder = re.search(r"uv venv \S+ \S+ \S+ (\S+)", rollout)[1]  # type: ignore[index]
    assert f"COPY --from=rollout {folder} {folder}\n" in trainer
    assert f"ENV SPARK_SGLANG_PYTHON={folder}/bin/python" in trainer
    assert re.findall(r"uv==\S+", trainer) == re.findall(r"uv==\S+", rollout), (
        "or its Python is not there"
    )


def test_compiled_parts_are_imported_after_torch() -> None:
    """apex's modules are linked with torch's libraries and do not look for them: NVIDIA/apex issue
    1934.
    """
    imported = re.search(
        r'python -c "import (.*?);', (REPO / "containers/Dockerfile.trainer").read_text()
    )
    assert imported is not None and imported[1].startswith("torch, amp_C")
