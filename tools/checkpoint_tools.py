"""What the tools over checkpoints share: how an error in the input ends them, and what a conversion says at its end."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from spark_nemo.config.errors import ConfigError

if TYPE_CHECKING:
    from spark_nemo.megatron.checkpoint.conversion import Converted


def exit_status(work: Callable[[], int | None]) -> int:
    """The status of ``work``, 0 when it has none, and 2 after an error in the input, which is printed."""
    try:
        return work() or 0
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def say(done: Converted) -> None:
    """Print what a conversion has made, and how fast."""
    print(f"{done.folder}: {done.num_tensors} tensors, {done.num_bytes / 1e9:.2f} GB in {done.seconds:.1f} s "
          f"({done.num_bytes / 1e6 / done.seconds:.0f} MB/s)")
