"""What is in a checkpoint: format, step, layout, and name, shape, type and size of every tensor, without loading any.

    python tools/inspect_checkpoint.py checkpoints/qwen2.5-7b
    python tools/inspect_checkpoint.py runs/rl/checkpoints --summary

Reads Hugging Face, Megatron (torch_dist) and NeMo 2 folders, and runs of training. See docs/checkpoints.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from spark_nemo.config.errors import ConfigError


def main(arguments: list[str] | None = None) -> int:
    """2 after an error in the input, which is printed; else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--summary", action="store_true", help="leave out the list of tensors")
    given = parser.parse_args(arguments)
    from spark_nemo.megatron.checkpoint.inspection import describe

    try:
        for line in describe(given.folder, every_tensor=not given.summary):
            print(line)
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
