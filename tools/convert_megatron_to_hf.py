"""Convert a Megatron (torch_dist) or NeMo 2 checkpoint, also one of training, to a Hugging Face
model folder.

    python tools/convert_megatron_to_hf.py checkpoints/qwen2.5-7b models/out
    python tools/convert_megatron_to_hf.py runs/rl/checkpoints models/trained --hf-config models/Qwen2.5-7B
    python tools/convert_megatron_to_hf.py checkpoints/qwen2.5-7b-nemo models/out
    python tools/convert_megatron_to_hf.py checkpoints/qwen2.5-7b-nemo checkpoints/megatron --to megatron

The source may be a folder with weights, or a run's folder of checkpoints, whose newest is taken.
Any layout and any code based on megatron-core may have written it. An optimizer in it is left
behind. See docs/checkpoints.md.
"""

from __future__ import annotations

import argparse
import sys

import torch
from checkpoint_tools import exit_status, folder, gigabytes, say

from spark_nemo.config.errors import without_effect


def main(arguments: list[str] | None = None) -> int:
    """2 after an error in the input, which is printed; else 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=folder, help="Megatron or NeMo 2 folder")
    parser.add_argument("target", type=folder, help="folder to make")
    parser.add_argument(
        "--to", choices=["hf", "megatron", "nemo"], default="hf", help="default: hf"
    )
    parser.add_argument(
        "--hf-config",
        type=folder,
        help="folder with the model's config.json and tokenizer, when the source has none",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "float16", "bfloat16"],
        help="convert all tensors to this type; by default they keep theirs, bit for bit",
    )
    parser.add_argument(
        "--max-shard-gb",
        type=gigabytes,
        metavar="N",
        help="largest safetensors file, in 2^30 bytes (default: 4)",
    )
    given = parser.parse_args(arguments)
    return exit_status(lambda: rewrite(given))


def rewrite(given: argparse.Namespace) -> None:
    """Convert and say what became of it."""
    from spark_nemo.megatron.checkpoint.conversion import convert

    size = {}
    if given.max_shard_gb is not None:
        if given.to != "hf":
            raise without_effect("--max-shard-gb", given.max_shard_gb, f"with --to {given.to}")
        size = {"max_shard_bytes": int(given.max_shard_gb * 2**30)}
    say(
        convert(
            given.source,
            given.target,
            given.to,
            hf_config_from=given.hf_config,
            show_progress=True,
            dtype=given.dtype and getattr(torch, given.dtype),
            **size,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
