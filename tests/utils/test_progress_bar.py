"""Progress in a log: few whole lines. What a terminal shows is tqdm's and not tested here."""

import pytest

from spark_nemo.utils import progress_bar as module


@pytest.fixture
def clock(monkeypatch):
    """Seconds that a test advances. Pytest captures to a file, not to a terminal."""
    seconds = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: seconds[0])
    return seconds


def test_a_log_gets_few_whole_lines(clock, capsys):
    """Ten thousand redraws within a second are the first and the last state; a minute more is two
    lines more. No carriage returns. That tqdm redraws no more often than it says is not looked at.
    """
    with module.progress_bar(total=10_000, desc="rl", unit="step", mininterval=0) as bar:
        for step in range(10_000):
            bar.set_postfix_str(f"reward={step}")
            bar.update()
            if step in (5000, 6000):
                clock[0] += module.LINE_EVERY_S
    log = capsys.readouterr().err
    lines = log.splitlines()
    assert len(lines) == 4 and "\r" not in log
    assert lines[0].startswith("rl:   0%| 0/10000") and lines[-1].startswith(
        "rl: 100%| 10000/10000"
    )
    assert "reward=9999" in lines[-1]


def test_a_silent_bar_says_nothing(capsys):
    """``disable`` is tqdm's: ranks other than the main one, and ``show_progress=False``."""
    with module.progress_bar(total=2, disable=True) as bar:
        bar.update(2)
    assert capsys.readouterr().err == ""


def test_a_line_of_progress_is_told_from_the_words_of_a_job(capsys):
    """The pipeline quotes a failed job's last line without this mark of a progress bar."""
    module.progress_bar(total=2, desc="sft").close()
    assert "%|" in capsys.readouterr().err
