"""Convert a Megatron (torch_dist) or NeMo 2 checkpoint, also one of training, to a Hugging Face model folder.

    python tools/convert_megatron_to_hf.py checkpoints/qwen2.5-7b models/out
    python tools/convert_megatron_to_hf.py runs/rl/checkpoints models/trained --hf-config models/Qwen2.5-7B
    python tools/convert_megatron_to_hf.py checkpoints/qwen2.5-7b-nemo models/out
    python tools/convert_megatron_to_hf.py checkpoints/qwen2.5-7b-nemo checkpoints/megatron --to megatron

The source may be a folder with weights, or a run's folder of checkpoints, whose newest is taken. Any layout and any
code based on megatron-core may have written it. An optimizer in it is left behind. See docs/checkpoints.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from checkpoint_tools import exit_status, say


def main(arguments: list[str] | None = None) -> int:
    """2 after an error in the input, which is printed; else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="Megatron or NeMo 2 folder")
    parser.add_argument("target", type=Path, help="folder to make")
    parser.add_argument("--to", choices=["hf", "megatron", "nemo"], default="hf")
    parser.add_argument("--hf-config", type=Path,
                        help="folder with the model's config.json and tokenizer, when the source has none")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"],
                        help="convert all tensors to this type; by default they keep theirs, bit for bit")
    parser.add_argument("--max-shard-gb", type=float, default=4.0, help="size of one safetensors file")
    given = parser.parse_args(arguments)
    from spark_nemo.megatron.checkpoint.conversion import convert

    return exit_status(lambda: say(convert(
        given.source, given.target, given.to, hf_config_from=given.hf_config, show_progress=True,
        dtype=given.dtype and getattr(torch, given.dtype), max_shard_bytes=int(given.max_shard_gb * 2**30))))


if __name__ == "__main__":
    sys.exit(main())
