"""Clean stop of a run: Ctrl-C, SIGTERM (Slurm's warning) or a STOP file in the run folder."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType, TracebackType

STOP_FILE = "STOP"
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopFlag:
    """A context manager in which a first signal requests a stop instead of ending the process.

    Loops read ``requested`` between steps, then write their checkpoint and return. A second signal
    acts as usual: KeyboardInterrupt or the end of the process. Use it in the main thread: Python
    handles signals only there.
    """

    def __init__(self, run_folder: Path) -> None:
        self.stop_file = Path(run_folder) / STOP_FILE
        self.reason = ""
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopFlag:
        self._previous = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous = {}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name
        self._restore()

    @property
    def requested(self) -> bool:
        """True once a stop was requested.

        Ranks can differ for a moment, so they must agree before they act on it.
        """
        if not self.reason and self.stop_file.exists():
            self.reason = str(self.stop_file)
        return bool(self.reason)
