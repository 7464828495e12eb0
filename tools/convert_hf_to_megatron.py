"""Convert a Hugging Face model folder to a Megatron (torch_dist) or NeMo 2 checkpoint.

    python tools/convert_hf_to_megatron.py models/Qwen2.5-7B checkpoints/qwen2.5-7b
    python tools/convert_hf_to_megatron.py models/Qwen2.5-7B checkpoints/qwen2.5-7b-nemo --to nemo

Tensor by tensor: no GPU is needed, no model is built, and memory stays below 2 GB plus the largest
tensor. Every tensor and pipeline layout can load the result. After a kill, the same command
resumes. See docs/checkpoints.md.
"""

from __future__ import annotations

import argparse
import sys

from checkpoint_tools import add_conversion_arguments, convert_checkpoint, exit_status


def main(arguments: list[str] | None = None) -> int:
    """Return 2 after an error in the input, which is printed; else 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_conversion_arguments(parser, source="folder with config.json and safetensors")
    parser.add_argument(
        "--to", choices=["megatron", "nemo"], default="megatron", help="default: megatron"
    )
    parser.add_argument("--trust-pickle", action="store_true", help="also read pytorch_model*.bin")
    given = parser.parse_args(arguments)
    return exit_status(lambda: convert_checkpoint(given, trust_pickle=given.trust_pickle))


if __name__ == "__main__":
    sys.exit(main())
