"""Checksums of SGLang's parameters, made from Hugging Face tensors as they stream past. The outside
reference is built here with torch.cat and slicing; that SGLang hashes the same is shown by
tests/real_sglang.
"""

import hashlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from spark_nemo.models.param_mapping import hf_tensor_shapes
from spark_nemo.models.spec import ModelSpec
from spark_nemo.weight_sync.checksum import ExpectedChecksums, differing
from spark_nemo.weight_sync.sync_plan import plan_sync
from spark_nemo.weight_sync.tensor_digest import WordDigest

CONFIG = {
    "model_type": "qwen2",
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 70,
    "tie_word_embeddings": False,
}
SPEC = ModelSpec.from_hf(CONFIG)


def sha(tensor):
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def stacked(tensors, prefix, names, ranges):
    return torch.cat([tensors[f"{prefix}{name}"][a:b] for name, (a, b) in zip(names, ranges)])


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_fused_sharded_padded(tp):
    """In bfloat16 and with more ranks than the 2 key-value heads, every rank's fused q/k/v, gate/up,
    column slices and zero-padded vocabulary hash as if they had been built.
    """
    tensors = {
        name: torch.randn(shape).bfloat16() for name, shape in hf_tensor_shapes(SPEC).items()
    }
    plan = plan_sync(
        SPEC,
        "bfloat16",
        tensor_parallel=1,
        engine_tensor_parallel=tp,
        bucket_bytes=100,
    )
    expected = ExpectedChecksums(plan.engine_ranks, torch.bfloat16)
    for planned in plan.tensors:
        expected.add(planned.name, tensors[planned.name])
    found = expected.result()
    assert [len(rank) for rank in found] == [2 * 7 + 3] * tp
    padded = torch.cat([tensors["lm_head.weight"], torch.zeros(58, 16).bfloat16()])
    for rank, sums in enumerate(found):
        p, q, f, v = "model.layers.1.", 16 // tp, 24 // tp, 128 // tp
        kv = (
            (rank * 8 // tp, (rank + 1) * 8 // tp)
            if tp <= 2
            else (rank // 2 * 4, rank // 2 * 4 + 4)
        )
        rows = [(rank * q, (rank + 1) * q), kv, kv]
        for kind in ("weight", "bias"):
            parts = [f"self_attn.{x}_proj.{kind}" for x in "qkv"]
            assert sums[f"{p}self_attn.qkv_proj.{kind}"] == sha(stacked(tensors, p, parts, rows))
        gate_up = [f"mlp.{x}_proj.weight" for x in ("gate", "up")]
        assert sums[f"{p}mlp.gate_up_proj.weight"] == sha(
            stacked(tensors, p, gate_up, [(rank * f, (rank + 1) * f)] * 2)
        )
        assert sums[f"{p}mlp.down_proj.weight"] == sha(
            tensors[f"{p}mlp.down_proj.weight"][:, rank * f : (rank + 1) * f]
        )
        assert sums[f"{p}self_attn.o_proj.weight"] == sha(
            tensors[f"{p}self_attn.o_proj.weight"][:, rank * q : (rank + 1) * q]
        )
        assert sums["lm_head.weight"] == sha(padded[rank * v : (rank + 1) * v])
        assert sums["model.norm.weight"] == sha(tensors["model.norm.weight"])


def test_an_unfinished_export_has_no_checksum():
    """A missing tensor is an error that names it, not a hash of the rest."""
    plan = plan_sync(
        SPEC,
        "float32",
        tensor_parallel=1,
        engine_tensor_parallel=1,
        bucket_bytes=100,
    )
    expected = ExpectedChecksums(plan.engine_ranks, torch.float32)
    for planned in plan.tensors[:-1]:
        expected.add(planned.name, torch.zeros(planned.shape))
    with pytest.raises(ValueError, match=r"lm_head\.weight never came"):
        expected.result()


def test_differences_are_named():
    """Changed, missing and surplus tensors by name, with the rank where there are several."""
    assert differing([{"a": "1", "b": "2"}], [{"a": "1", "b": "3", "c": "4"}]) == [
        "b",
        "c (never sent)",
    ]
    assert differing([{"a": "1"}, {"a": "1"}], [{"a": "1"}, {}]) == ["a (rank 1)"]
    assert differing([{"a": "1"}], [{"a": "1"}, {"a": "1"}]) == [
        "all: the engine has 2 ranks, 1 were planned"
    ]


@pytest.mark.parametrize(
    ("count", "dtype", "expected"),
    [
        (4, torch.float32, "f37b34f4fb3f173c"),
        (1000, torch.float32, "58f0b33a4d979bbf"),
        (8192, torch.float32, "215f40d8dfdfc259"),
        (20000, torch.float32, "5265eaa0ed4b230c"),
        (50000, torch.bfloat16, "6f34fa81d716e4c7"),
    ],
)
@pytest.mark.parametrize("block", [1000, 8192, 100000])
def test_the_hash_of_gpu_tensors(count, dtype, expected, block):
    """SGLang's hash for tensors on a GPU does not depend on the blocks. The values are from sglang
    0.5.21's own Triton kernel, run by Triton's interpreter on a CPU, not on a GPU.
    """
    row = ((torch.arange(count) % 97 - 40) / 8).to(dtype)
    digest = WordDigest(row.nbytes, row.device)
    for start in range(0, count, block):
        digest.update(row[start : start + block])
    assert digest.hexdigest() == expected


class Kernels(TorchDispatchMode):
    """Counts torch's calls, views included."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("size", [40, 1 << 10, (2 << 20) + 8])
def test_many_small_pieces_are_hashed_together(size):
    """A piece may be overwritten once it was added, as an export does. A thousand small pieces of
    experts cost some calls each, not the fifty of a hash of their own.
    """
    count = 2 if size > 1 << 20 else 1000
    whole = torch.randn(count * size)
    at_once, digest = WordDigest(whole.nbytes, whole.device), WordDigest(whole.nbytes, whole.device)
    at_once.update(whole)
    with Kernels() as kernels:
        for piece in whole.clone().split(size):
            digest.update(piece)
            piece.zero_()
    assert digest.hexdigest() == at_once.hexdigest()
    assert kernels.count < count * (12 if count == 1000 else 70)
