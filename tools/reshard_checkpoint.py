"""Rewrite a training checkpoint, weights and optimizer, for another layout, and verify it.

    python tools/reshard_checkpoint.py runs/rl/checkpoints runs/tp8 \\
        --tensor-parallel 8 --pipeline-parallel 4

A run also resumes under another layout without this tool: each rank then reads all stored boxes
that overlap its part of the tensors. The tool cuts the boxes for the new ranks, so that each reads
only its part. It checks that the layout can split the model and that every tensor kept its bits. An
optimizer state that only the old layout can read (dp_reshardable) is an error. See
docs/checkpoints.md.
"""

from __future__ import annotations

import argparse
import sys

from checkpoint_tools import exit_status, folder

from spark_nemo.config import MegatronConfig


def main(arguments: list[str] | None = None) -> int:
    """Return 2 after an error in the input, which is printed; else 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "source", type=folder, help="a run's folder of checkpoints, for its newest, or a checkpoint"
    )
    parser.add_argument("target", type=folder, help="folder to make")
    parser.add_argument("--tensor-parallel", type=int, default=1, metavar="N", help="default: 1")
    parser.add_argument("--pipeline-parallel", type=int, default=1, metavar="N", help="default: 1")
    parser.add_argument(
        "--hf-config",
        type=folder,
        help="folder with the model's config.json, if the source has none",
    )
    given = parser.parse_args(arguments)
    return exit_status(lambda: rewrite(given))


def rewrite(given: argparse.Namespace) -> None:
    """Reshard and print the result."""
    from spark_nemo.megatron.checkpoint.reshard import reshard

    layout = MegatronConfig(
        tensor_parallel=given.tensor_parallel,
        pipeline_parallel=given.pipeline_parallel,
        sequence_parallel=given.tensor_parallel > 1,
    )
    done = reshard(given.source, given.target, layout, given.hf_config, show_progress=True)
    print(
        f"{done.target}: {done.num_tensors} tensors in {done.num_boxes} boxes, bit for bit the "
        f"same as in {done.source}"
    )


if __name__ == "__main__":
    sys.exit(main())
