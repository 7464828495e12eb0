"""Print a checkpoint's format, step and layout, and the shape, type and size of every tensor.

    python tools/inspect_checkpoint.py checkpoints/qwen2.5-7b
    python tools/inspect_checkpoint.py runs/rl/checkpoints --summary

Reads Hugging Face, Megatron (torch_dist) and NeMo 2 folders, and training runs, without loading a
tensor. See docs/checkpoints.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from checkpoint_tools import exit_status, folder


def main(arguments: list[str] | None = None) -> int:
    """Return 2 after an error in the input, which is printed; else 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder",
        type=folder,
        help="a checkpoint, or a run's folder of checkpoints, for its newest",
    )
    parser.add_argument("--summary", action="store_true", help="leave out the list of tensors")
    given = parser.parse_args(arguments)
    return exit_status(lambda: inspect(given.folder, every_tensor=not given.summary))


def inspect(folder: Path, *, every_tensor: bool) -> None:
    """Print the description of ``folder``."""
    from spark_nemo.megatron.checkpoint.inspection import describe

    for line in describe(folder, every_tensor=every_tensor):
        print(line)


if __name__ == "__main__":
    sys.exit(main())
