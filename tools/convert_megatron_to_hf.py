"""Convert a Megatron (torch_dist) or NeMo 2 checkpoint, also of training, to a Hugging Face folder.

    python tools/convert_megatron_to_hf.py checkpoints/qwen2.5-7b models/out
    python tools/convert_megatron_to_hf.py runs/rl/checkpoints models/trained \\
        --hf-config models/Qwen2.5-7B
    python tools/convert_megatron_to_hf.py checkpoints/qwen2.5-7b-nemo models/out
    python tools/convert_megatron_to_hf.py checkpoints/qwen2.5-7b-nemo checkpoints/megatron \\
        --to megatron

The source is a folder with weights, or a run's folder of checkpoints, of which the newest is
converted. Any layout and any code based on megatron-core may have written it. Optimizer state is
left out. See docs/checkpoints.md.
"""

from __future__ import annotations

import argparse
import sys

from checkpoint_tools import (
    add_conversion_arguments,
    convert_checkpoint,
    exit_status,
    folder,
    gigabytes,
)

from spark_nemo.config.errors import without_effect


def main(arguments: list[str] | None = None) -> int:
    """Return 2 after an error in the input, which is printed; else 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_conversion_arguments(parser, source="Megatron or NeMo 2 folder")
    parser.add_argument(
        "--to", choices=["hf", "megatron", "nemo"], default="hf", help="default: hf"
    )
    parser.add_argument(
        "--hf-config",
        type=folder,
        help="folder with the model's config.json and tokenizer, if the source has none",
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
    """Convert and print the result."""
    options: dict[str, object] = {"hf_config_from": given.hf_config}
    if given.max_shard_gb is not None:
        if given.to != "hf":
            raise without_effect("--max-shard-gb", given.max_shard_gb, f"with --to {given.to}")
        options["max_shard_bytes"] = int(given.max_shard_gb * 2**30)
    convert_checkpoint(given, **options)


if __name__ == "__main__":
    sys.exit(main())
