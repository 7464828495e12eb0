"""Convert a Hugging Face model folder to a Megatron (torch_dist) or NeMo 2 checkpoint, a tensor at
a time.

    python tools/convert_hf_to_megatron.py models/Qwen2.5-7B checkpoints/qwen2.5-7b
    python tools/convert_hf_to_megatron.py models/Qwen2.5-7B checkpoints/qwen2.5-7b-nemo --to nemo

No GPU and no model is needed; memory stays below 2 GB plus the largest tensor. Every tensor and
pipeline layout can load the result. After a kill, the same command goes on where it was. See
docs/checkpoints.md.
"""

from __future__ import annotations

import argparse
import sys

import torch
from checkpoint_tools import exit_status, folder, say


def main(arguments: list[str] | None = None) -> int:
    """2 after an error in the input, which is printed; else 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=folder, help="folder with config.json and safetensors")
    parser.add_argument("target", type=folder, help="folder to make")
    parser.add_argument(
        "--to", choices=["megatron", "nemo"], default="megatron", help="default: megatron"
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "float16", "bfloat16"],
        help="convert all tensors to this type; by default they keep theirs, bit for bit",
    )
    parser.add_argument("--trust-pickle", action="store_true", help="also read pytorch_model*.bin")
    given = parser.parse_args(arguments)
    return exit_status(lambda: rewrite(given))


def rewrite(given: argparse.Namespace) -> None:
    """Convert and say what became of it."""
    from spark_nemo.megatron.checkpoint.conversion import convert

    say(
        convert(
            given.source,
            given.target,
            given.to,
            dtype=given.dtype and getattr(torch, given.dtype),
            trust_pickle=given.trust_pickle,
            show_progress=True,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
