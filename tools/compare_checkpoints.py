"""Compare two checkpoints tensor by tensor, whatever their formats, and their logits on a text.

    python tools/compare_checkpoints.py models/Qwen2.5-7B checkpoints/qwen2.5-7b
    python tools/compare_checkpoints.py models/a models/b --tolerance 1e-3 --text prompt.txt
    python tools/compare_checkpoints.py run/step-00000010 other/step-00000010 --with-optimizer

Prints every tensor that is not the same, then a summary. The exit status is 1 when a tensor differs
by more than --tolerance, is missing or surplus, or has another shape; 2 after an error. See
docs/checkpoints.md.
"""

from __future__ import annotations

import argparse
import sys

from checkpoint_tools import exit_status, folder, tolerance

from spark_nemo.config.errors import ConfigError, without_effect


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status described above."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("one", type=folder, help="a checkpoint of any format")
    parser.add_argument("other", type=folder, help="the checkpoint to compare it with")
    parser.add_argument(
        "--tolerance",
        type=tolerance,
        default=0.0,
        help="largest absolute difference to accept (default: 0)",
    )
    parser.add_argument(
        "--text", type=folder, help="also build both models and compare float32 logits on this file"
    )
    parser.add_argument(
        "--with-optimizer",
        action="store_true",
        help="compare two Megatron folders under their stored names, optimizer included",
    )
    parser.add_argument(
        "--hf-config", type=folder, help="folder with config.json for sources that have none"
    )
    parser.add_argument("--trust-pickle", action="store_true", help="also read pytorch_model*.bin")
    given = parser.parse_args(arguments)
    return exit_status(lambda: compare(given))


def compare(given: argparse.Namespace) -> int:
    """Print the differences and return the exit status."""
    import torch

    from spark_nemo.megatron.checkpoint.compare_tensors import (
        compare_models,
        compare_stored,
        logits_difference,
    )
    from spark_nemo.megatron.checkpoint.reader import open_checkpoint
    from spark_nemo.megatron.checkpoint.torch_dist_reader import StoredCheckpoint
    from spark_nemo.megatron.checkpoint.training_checkpoint import newest

    text = read_text(given)
    if given.with_optimizer:
        one = StoredCheckpoint(newest(given.one))
        other = StoredCheckpoint(newest(given.other))
        differences = compare_stored(one, other)
    else:
        opened = []
        for path in (given.one, given.other):
            has_config = (path / "config.json").is_file()
            checkpoint = open_checkpoint(
                path,
                hf_config_from=None if has_config else given.hf_config,
                # A given type turns off the check against config.json's; nothing is converted.
                dtype=torch.float32 if has_config else None,
                trust_pickle=given.trust_pickle,
            )
            opened.append(checkpoint)
        differences = compare_models(*opened)
    total = 0
    bad = 0
    worst = 0.0
    for found in differences:
        total += 1
        if found.found == "same":
            continue
        worst = max(worst, found.max_abs)
        accepted = found.found in ("differs", "dtype") and found.max_abs <= given.tolerance
        bad += not accepted
        detail = f" {found.detail}" if found.detail else ""
        print(f"{found.name}: {found.found}{detail}, max {found.max_abs:.3g}")
    print(
        f"{total} tensors, {bad} not the same within {given.tolerance:g}, "
        f"largest difference {worst:.3g}"
    )
    if text is not None:
        tokenizer = next(
            (path for x in opened for path in x.companions if (path / "tokenizer.json").is_file()),
            opened[0].companions[0],
        )
        with torch.no_grad():
            logits = logits_difference(*opened, text, tokenizer)
        print(f"logits: largest difference {logits:.3g}")
        bad += logits > max(given.tolerance, 0.0)
    return 1 if bad else 0


def read_text(given: argparse.Namespace) -> str | None:
    """Return the text to compute logits of. Raises ``ConfigError`` if unreadable or unused."""
    if given.text is None:
        return None
    if given.with_optimizer:
        raise without_effect("--text", given.text, "with --with-optimizer, which builds no model")
    try:
        return given.text.read_text()
    except UnicodeDecodeError as error:
        raise ConfigError(f"--text {given.text} is not text: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
