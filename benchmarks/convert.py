"""Measure the conversion of an 8 GB checkpoint: peak memory, and rate relative to ``cp``.

    python benchmarks/convert.py --folder /scratch/tmp [--gigabytes 8]

Random bfloat16 weights with the shapes of Qwen2.5-7B and as many layers as fit. Every measurement
is a process of its own; each finds its input as the step before left it in the page cache, and ends
with an fsync of what it wrote. Everything is below a new folder in ``--folder`` and is deleted at
the end; it needs four times --gigabytes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

QWEN25_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 32768,
    "hidden_act": "silu",
    "use_sliding_window": False,
    "dtype": "bfloat16",
}
LAYER_BYTES = 466_115_584
REST_BYTES = 2_179_993_600


def make_model(folder: Path, gigabytes: float) -> None:
    """Write the synthetic model; all tensors are shifts of one block of random numbers."""
    import torch

    from spark_nemo.megatron.hf_files import write_tensors
    from spark_nemo.models.param_mapping import hf_tensor_shapes
    from spark_nemo.models.spec import ModelSpec

    config = {
        **QWEN25_7B,
        "num_hidden_layers": max(1, round((gigabytes * 1e9 - REST_BYTES) / LAYER_BYTES)),
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    shapes = hf_tensor_shapes(ModelSpec.from_hf(config))
    noise = torch.randn(64 << 20, generator=torch.Generator().manual_seed(0)).bfloat16()

    def tensors():  # noqa: ANN202
        for number, (name, size) in enumerate(shapes.items()):
            count = torch.Size(size).numel()
            yield name, noise.roll(number * 7919).repeat(-(-count // len(noise)))[:count].view(size)

    write_tensors(folder, tensors(), shapes, torch.bfloat16)


def measure(what: str, source: Path, target: Path) -> dict[str, float]:
    """Run one step in a child process and return its seconds and peak resident memory."""
    output = subprocess.run(
        [sys.executable, __file__, "--step", what, str(source), str(target)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    return json.loads(output.splitlines()[-1])


def step(what: str, source: Path, target: Path) -> None:
    """Run one step in this process and print its measurements as JSON."""
    if what == "make":
        make_model(target, float(source.name))
        result = {}
    elif what == "cp":
        start = time.perf_counter()
        subprocess.run(["cp", "-r", str(source), str(target)], check=True)
        copied = time.perf_counter() - start
        for path in target.rglob("*"):
            if path.is_file():
                descriptor = os.open(path, os.O_RDONLY)
                os.fsync(descriptor)
                os.close(descriptor)
        result = {"seconds": time.perf_counter() - start, "without_fsync": copied}
    else:
        from spark_nemo.megatron.checkpoint.conversion import convert

        idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        convert(source, target, what)
        result = {
            "seconds": time.perf_counter() - start,
            "idle": idle * 1024,
            "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
    print(json.dumps(result))


def same_files(one: Path, other: Path) -> bool:
    """True if all safetensors of two folders are byte for byte the same."""
    names = sorted(path.name for path in one.glob("*.safetensors"))
    return names == sorted(path.name for path in other.glob("*.safetensors")) and all(
        subprocess.run(["cmp", "-s", one / name, other / name], check=False).returncode == 0
        for name in names
    )


def main() -> int:
    """Return 0 if both directions meet the targets: half of cp's rate, 2 GB plus a tensor."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--gigabytes", type=float, default=8)
    parser.add_argument("--step", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        step(arguments.step[0], Path(arguments.step[1]), Path(arguments.step[2]))
        return 0
    root = Path(tempfile.mkdtemp(prefix="convert-", dir=arguments.folder))
    try:
        return report(root, arguments.gigabytes)
    finally:
        shutil.rmtree(root)


def report(root: Path, gigabytes: float) -> int:
    """Run the steps, print a table and return the exit status."""
    # In a child, too: a process starts with its parent's memory in its peak.
    measure("make", Path(str(gigabytes)), root / "hf")
    num_bytes = sum(path.stat().st_size for path in (root / "hf").glob("*.safetensors"))
    largest = QWEN25_7B["vocab_size"] * QWEN25_7B["hidden_size"] * 2
    limit = 2e9 + largest
    good = True
    print(
        f"{num_bytes / 1e9:.2f} GB, largest tensor {largest / 1e9:.2f} GB, "
        f"memory limit {limit / 1e9:.2f} GB"
    )
    for name, what, source in (
        ("hf -> megatron", "megatron", "hf"),
        ("megatron -> hf", "hf", "mg"),
    ):
        copy = measure("cp", root / source, root / "copy")
        shutil.rmtree(root / "copy")
        target = root / ("mg" if what == "megatron" else "back")
        done = measure(what, root / source, target)
        ratio = copy["seconds"] / done["seconds"]
        good = good and ratio >= 0.5 and done["peak"] < limit
        print(
            f"{name}: {num_bytes / 1e6 / done['seconds']:.0f} MB/s, cp and fsync "
            f"{num_bytes / 1e6 / copy['seconds']:.0f} MB/s (cp alone "
            f"{num_bytes / 1e6 / copy['without_fsync']:.0f}), ratio {ratio:.2f}; peak memory "
            f"{done['peak'] / 1e9:.2f} GB (after imports {done['idle'] / 1e9:.2f})",
            flush=True,
        )
    exact = same_files(root / "hf", root / "back")
    print(f"round trip {'bit-exact' if exact else 'NOT EXACT'}")
    return 0 if good and exact else 1


if __name__ == "__main__":
    sys.exit(main())
