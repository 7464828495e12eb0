"""Parsing of the command line: misspelt words are one line with the nearest valid word."""

from __future__ import annotations

import pytest

from spark_nemo.cli.main import main


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stag1"], "did you mean stage1?"),
        (["stage1", "--dry-rn"], "did you mean --dry-run?"),
        (["data", "stat", "runs/first"], "did you mean stats?"),
        (["plan", "--stage", "stag3", "--nodes", "1"], "did you mean stage3?"),
        (["status"], "RUN"),
    ],
)
def test_a_misspelt_word_is_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Proves that the user sees the mistake and not the usage of the whole command."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error


def test_overrides_may_follow_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    """Proves that flags and overrides may be mixed."""
    words = ["+experiment=toy", "--print-config", "rl.group_size=3"]
    assert main(["stage3", *words]) == 0
    assert "group_size: 3" in capsys.readouterr().out
