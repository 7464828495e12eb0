"""Compare two checkpoints tensor by tensor, whatever their formats, and their logits on a text.

    python tools/compare_checkpoints.py models/Qwen2.5-7B checkpoints/qwen2.5-7b
    python tools/compare_checkpoints.py models/a models/b --tolerance 1e-3 --text prompt.txt
    python tools/compare_checkpoints.py run/step-00000010 other/step-00000010 --with-optimizer

Prints every tensor that is not the same, then a summary. Exit status 1 when some tensor differs by more than
--tolerance, is missing, surplus, or of another shape; 2 after an error. See docs/checkpoints.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from checkpoint_tools import exit_status


def main(arguments: list[str] | None = None) -> int:
    """The exit status described above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("one", type=Path)
    parser.add_argument("other", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.0, help="largest absolute difference to accept")
    parser.add_argument("--text", type=Path, help="also build both models and compare float32 logits on this file")
    parser.add_argument("--with-optimizer", action="store_true",
                        help="compare two Megatron folders under their stored names, optimizer included")
    parser.add_argument("--hf-config", type=Path, help="folder with config.json for sources that have none")
    parser.add_argument("--trust-pickle", action="store_true", help="also read pytorch_model*.bin")
    given = parser.parse_args(arguments)
    return exit_status(lambda: compare(given))


def compare(given: argparse.Namespace) -> int:
    """Print differences and return the exit status."""
    import torch

    from spark_nemo.megatron.checkpoint.compare import compare_models, compare_stored, logits_difference
    from spark_nemo.megatron.checkpoint.opened import open_checkpoint
    from spark_nemo.megatron.checkpoint.stored import StoredCheckpoint
    from spark_nemo.megatron.checkpoint.training import newest

    if given.with_optimizer:
        differences = compare_stored(*(StoredCheckpoint(newest(path)) for path in (given.one, given.other)))
    else:
        opened = [open_checkpoint(path, given.hf_config if not (path / "config.json").is_file() else None,
                                  trust_pickle=given.trust_pickle) for path in (given.one, given.other)]
        differences = compare_models(*opened)
    total, bad, worst = 0, 0, 0.0
    for found in differences:
        total += 1
        if found.found == "same":
            continue
        worst = max(worst, found.max_abs)
        accepted = found.found in ("differs", "dtype") and found.max_abs <= given.tolerance
        bad += not accepted
        print(f"{found.name}: {found.found}{' ' + found.detail if found.detail else ''}, max {found.max_abs:.3g}")
    print(f"{total} tensors, {bad} not the same within {given.tolerance:g}, largest difference {worst:.3g}")
    if given.text is not None and not given.with_optimizer:
        tokenizer = next((path for x in opened for path in x.companions if (path / "tokenizer.json").is_file()),
                         opened[0].companions[0])
        with torch.no_grad():
            logits = logits_difference(*opened, given.text.read_text(), tokenizer)
        print(f"logits: largest difference {logits:.3g}")
        bad += logits > max(given.tolerance, 0.0)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
