"""Settings, commands and files that README.md and docs/ name exist."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from spark_nemo.cli.arguments import parse_arguments
from spark_nemo.cli.main import build_parser
from spark_nemo.config import SparkConfig
from spark_nemo.run.compose import compose_config, setting_names

REPO = Path(__file__).parents[2]
PAGES = [
    REPO / "README.md",
    REPO / "CONTRIBUTING.md",
    REPO / "containers/README.md",
    *sorted((REPO / "docs").glob("*.md")),
]
OF_THE_READER = ("conf/experiment/mine.yaml",)
"""Files that a page tells its reader to create."""


def commands(text: str) -> Iterator[str]:
    """Yield the ``spark-nemo`` commands of code blocks, with continuation lines, no comments."""
    for block in re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        joined = re.sub(r" *\\?\n +", " ", re.sub(r" +# .*", "", block))
        for line in joined.splitlines():
            if found := re.match(r"(?:\w+=\S+ )?(?:\.venv/bin/)?spark-nemo (.*)", line):
                yield found[1]


def documented() -> list[tuple[str, str]]:
    return [
        (page.name, line)
        for page in PAGES
        for line in commands(page.read_text())
        # tests/stages/test_plugins.py runs the commands with the reader's own module.
        if " ... " not in f"{line} " and line != "--help" and "my_designs" not in line
    ]


@pytest.mark.parametrize(("page", "line"), documented())
def test_a_command_of_the_documentation_parses_and_its_settings_compose(
    page: str, line: str
) -> None:
    """Checks subcommands, flags and overrides; starts nothing, so models may be missing."""
    arguments = parse_arguments(build_parser(), shlex.split(line))
    overrides = [
        word
        for word in getattr(arguments, "overrides", [])
        if "=" in word and not word.startswith(("old=", "new=")) and word != "+experiment=mine"
    ]
    if "compare" not in getattr(arguments, "overrides", []):
        compose_config(overrides)


def test_the_documentation_has_commands() -> None:
    """Guards the test above against a search that finds nothing."""
    assert len(documented()) > 30


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_and_files_of_a_page_exist(page: Path) -> None:
    """Checks names in backticks that begin with a section of the configuration, and links and paths
    within the repository; not whether the text about them is true.
    """
    text = page.read_text()
    sections = {each.name for each in fields(SparkConfig)}
    known = setting_names()
    for name in set(re.findall(r"`((?:[a-z_0-9]+\.)+[a-z_0-9]+)(?:=[^`]*)?`", text)):
        first, *rest = name.split(".")
        if first not in sections or rest[-1] in ("json", "jsonl", "sh", "py", "yaml"):
            continue
        assert name in known, f"{page.name}: {name}"
    for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        made_later = link.startswith(("http", "reference/"))  # generated with the site
        assert made_later or (page.parent / link).exists(), f"{page.name}: {link}"
    for path in re.findall(
        r"`((?:spark_nemo|tests|tools|benchmarks|conf|slurm|containers)/[\w./*-]+)`", text
    ):
        assert path in OF_THE_READER or list(REPO.glob(path)), f"{page.name}: {path}"
