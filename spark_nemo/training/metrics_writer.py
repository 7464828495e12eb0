"""Scalars of a run: ``metrics.jsonl`` with one row per step, and the same values in TensorBoard."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from spark_nemo.utils.files import write_text_atomic

log = logging.getLogger(__name__)
METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """Append rows to ``folder/metrics.jsonl`` and scalars to ``folder/tensorboard``.

    Only the main rank writes. Every row is flushed. A value that is not finite is stored as null
    and logged, since NaN is not JSON.
    """

    def __init__(self, folder: Path, *, is_main: bool = True) -> None:
        self.folder = Path(folder)
        self.path = self.folder / METRICS_FILE
        self.is_main = is_main
        self._board: SummaryWriter | None = None
        self._purge_step: int | None = None
        if is_main:
            self.folder.mkdir(parents=True, exist_ok=True)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Append one row; ``step`` counts finished optimizer steps (or RL steps) from 0."""
        if not self.is_main:
            return
        row: dict[str, float | int | None] = {"step": step}
        board = self._open_board()
        for name, value in scalars.items():
            row[name] = value if math.isfinite(value) else None
            if row[name] is None:
                log.warning("metric %s is %s at step %d", name, value, step)
            board.add_scalar(name, value, step)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        board.flush()

    def truncate_from(self, step: int) -> None:
        """Drop the rows of ``step`` and later, before a resumed run writes them again.

        The JSONL is rewritten atomically, without a last line that a kill has cut short.
        TensorBoard purges the same steps.
        """
        if not self.is_main:
            return
        self.close()
        self._purge_step = step
        kept = [row for row in read_metrics(self.path) if row["step"] < step]
        write_text_atomic(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def close(self) -> None:
        """Close the TensorBoard file; a later ``write`` opens a new one."""
        if self._board is not None:
            self._board.close()
            self._board = None

    def _open_board(self) -> SummaryWriter:
        if self._board is None:
            self._board = SummaryWriter(
                str(self.folder / "tensorboard"), purge_step=self._purge_step
            )
        return self._board


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return the rows of a metrics file; a missing file has none.

    A last line without a newline was cut short by a kill and is not a row. Raises ``ValueError``
    naming any other damaged line.
    """
    if not Path(path).exists():
        return []
    *lines, _unfinished = Path(path).read_text(encoding="utf-8").split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}:{number}: the line is not JSON; delete it to continue"
            ) from error
    return rows
