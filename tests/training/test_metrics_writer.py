"""The metrics file survives kills and resumes without duplicates; the stop flag hears signals and
files.
"""

import json
import os
import signal

import pytest

from spark_nemo.training.metrics_writer import MetricsWriter, read_metrics
from spark_nemo.training.stop import STOP_FILE, StopFlag


def test_rows_come_back_and_tensorboard_gets_them_too(tmp_path):
    """One JSON row per step, and a TensorBoard event file."""
    writer = MetricsWriter(tmp_path)
    writer.write(0, {"loss": 2.0})
    writer.write(1, {"loss": 1.5, "lr": 0.1})
    writer.close()
    assert read_metrics(writer.path) == [
        {"step": 0, "loss": 2.0},
        {"step": 1, "loss": 1.5, "lr": 0.1},
    ]
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_resuming_drops_the_rows_that_will_be_written_again(tmp_path):
    """Rows from the resumed step on go, earlier ones stay byte for byte, and so does a line torn by
    a kill.
    """
    writer = MetricsWriter(tmp_path)
    for step in range(5):
        writer.write(step, {"loss": step / 3})
    before = writer.path.read_text().splitlines()
    with writer.path.open("a") as file:
        file.write('{"step": 5, "lo')
    writer.truncate_from(3)
    assert writer.path.read_text().splitlines() == before[:3]
    writer.write(3, {"loss": 9.0})
    writer.close()
    assert [row["step"] for row in read_metrics(writer.path)] == [0, 1, 2, 3]


def test_damage_inside_the_file_is_an_error_not_a_gap(tmp_path):
    """Only the last line can be torn by a kill; anything else is named."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(ValueError, match="jsonl:2:"):
        read_metrics(path)


def test_a_value_that_is_not_finite_becomes_null(tmp_path):
    """NaN is not JSON; strict readers must not choke on the file."""
    writer = MetricsWriter(tmp_path)
    writer.write(0, {"loss": float("nan")})
    writer.close()
    assert json.loads(writer.path.read_text(), parse_constant=pytest.fail) == {
        "step": 0,
        "loss": None,
    }


def test_only_the_main_rank_writes(tmp_path):
    """Other ranks may call everything and leave no trace."""
    writer = MetricsWriter(tmp_path / "run", is_main=False)
    writer.write(0, {"loss": 1.0})
    writer.truncate_from(0)
    writer.close()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_acts(tmp_path, number):
    """A handler is installed inside the context only; the second signal uses the previous one."""
    seen = []
    outer = signal.signal(number, lambda *args: seen.append("second"))
    try:
        with StopFlag(tmp_path) as stop:
            assert not stop.requested
            os.kill(os.getpid(), number)
            assert stop.requested
            assert seen == []
            os.kill(os.getpid(), number)
            assert seen == ["second"]
    finally:
        signal.signal(number, outer)


def test_a_stop_file_requests_a_stop_too(tmp_path):
    """A user who cannot signal the job makes the file. It stays, so a requeued job does not start
    again by itself.
    """
    stop = StopFlag(tmp_path)
    assert not stop.requested
    (tmp_path / STOP_FILE).touch()
    assert stop.requested
    assert STOP_FILE in stop.reason
