"""Compare the Megatron tensors of Megatron-Bridge 0.3.1 with this project's, bit by bit.

    pip install --no-deps --target BRIDGE megatron-bridge==0.3.1 transformers==4.57.6 \\
        'huggingface_hub<1' 'tokenizers<=0.23' requests urllib3 charset-normalizer certifi idna \\
        hydra-core omegaconf \\
        antlr4-python3-runtime==4.9.3 einops
    python benchmarks/bridge_parity.py BRIDGE MODEL_FOLDER

BRIDGE is a folder of packages that goes before the installed ones, since the bridge wants
transformers 4 (and its dependencies). It also imports Transformer Engine, Triton and others, which
a CPU run does not need: empty modules replace them. Its model is megatron-core's with local layers;
every tensor of it is compared with the box of our conversion. config.json must be in transformers
4's form: rope_theta and torch_dtype on top, num_experts for Qwen3-MoE.
"""

from __future__ import annotations

import argparse
import importlib.abc
import importlib.machinery
import os
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

ABSENT = (
    "transformer_engine",
    "triton",
    "mamba_ssm",
    "causal_conv1d",
    "nvidia_resiliency_ext",
    "fla",
    "mlflow",
    "wandb",
    "nvtx",
    "modelopt",
    "flashinfer",
    "open_clip",
    "qwen_vl_utils",
    "timm",
    "datasets",
    "peft",
    "apex",
    "flash_attn",
)


class _Nothing(types.ModuleType):
    """A module in which every name exists: lower case is a submodule, the rest a torch module."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        import torch

        if name.startswith("__") and name != "__version__":
            raise AttributeError(name)
        if name == "__version__":
            return "2.9.0"
        made = (
            _Nothing(f"{self.__name__}.{name}")
            if name[0].islower()
            else type(name, (torch.nn.Module,), {})
        )
        setattr(self, name, made)
        return made

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return (
            arguments[0]
            if len(arguments) == 1 and callable(arguments[0])
            else lambda function: function
        )


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.split(".")[0] in ABSENT:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        return _Nothing(spec.name)

    def exec_module(self, module: types.ModuleType) -> None: ...


def bridge_model(folder: Path) -> Any:
    """Return the bridge's GPTModel with the weights of ``folder``."""
    import torch
    from megatron.bridge import AutoBridge
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    bridge = AutoBridge.from_hf_pretrained(str(folder), dtype=torch.bfloat16)
    provider = bridge.to_megatron_provider(load_weights=False)
    provider.moe_grouped_gemm = provider.moe_permute_fusion = False
    provider.transformer_layer_spec = get_gpt_layer_local_spec(
        normalization="RMSNorm",
        qk_layernorm=bool(provider.qk_layernorm),
        num_experts=provider.num_moe_experts,
    )
    if provider.num_moe_experts:
        # Local layers name the norm before experts as the one before a dense network; Transformer
        # Engine's do not.
        del provider.transformer_layer_spec.submodules.sharded_state_dict_keys_map[
            "pre_mlp_layernorm."
        ]
    provider.use_cpu_initialization = True
    provider.gradient_accumulation_fusion = False
    provider.masked_softmax_fusion = False
    provider.bias_dropout_fusion = False
    provider.apply_rope_fusion = False
    provider.persist_layer_norm = False
    if hasattr(provider, "finalize"):
        provider.finalize()
    model = provider.provide(pre_process=True, post_process=True).bfloat16()
    bridge.load_hf_weights([model])
    return model


def main() -> int:
    """Return 0 if every tensor has the same bits."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bridge", type=Path, help="folder of packages")
    parser.add_argument("model", type=Path, help="Hugging Face folder, bfloat16")
    given = parser.parse_args()
    sys.path.insert(0, str(given.bridge))
    # Before the empty modules: megatron-core must find the real ones missing.
    import megatron.core.models.gpt

    megatron.__path__.append(str(given.bridge / "megatron"))
    import torch
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    from spark_nemo.megatron.checkpoint.conversion import convert
    from spark_nemo.megatron.checkpoint.torch_dist_reader import StoredCheckpoint
    from spark_nemo.megatron.cpu_compat import cuda_means_cpu, seed_everything

    sys.meta_path.append(_Finder())
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29531")
    torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    seed_everything(0)
    with cuda_means_cpu(), tempfile.TemporaryDirectory() as scratch:
        ours = StoredCheckpoint(convert(given.model, Path(scratch) / "ours", "megatron").folder)
        theirs = bridge_model(given.model).sharded_state_dict(
            metadata={"singleton_local_shards": False}
        )
        entries = list(theirs.values())
        seen, wrong = set(), []
        while entries:
            entry = entries.pop()
            if isinstance(entry, ShardedTensorFactory):
                entry = entry.build()
            if isinstance(entry, (dict, list)):
                entries += entry.values() if isinstance(entry, dict) else entry
            elif isinstance(entry, ShardedTensor):
                seen.add(entry.key)
                rest = entry.data.shape
                size = (1,) * (len(entry.global_offset) - len(rest)) + tuple(rest)
                if not torch.equal(
                    ours.read(entry.key, entry.global_offset, size).reshape(rest), entry.data
                ):
                    wrong.append(f"{entry.key} {entry.global_offset}")
    for name in wrong:
        print(f"differs: {name}")
    missing = sorted(set(ours.tensors) - seen)
    print(
        f"{len(seen)} tensors, {len(wrong)} parts differ, {len(missing)} of ours are not in the "
        f"bridge's {missing[:3]}"
    )
    return 1 if wrong or missing or not seen else 0


if __name__ == "__main__":
    sys.exit(main())
