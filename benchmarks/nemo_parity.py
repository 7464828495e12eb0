"""Check that NeMo 2 (nemo-toolkit 2.7.3) and this project read each other's checkpoint folders.

Tiny models, CPU.

    python3.11 -m venv ENV
    ENV/bin/pip install torch==2.13.0 psutil 'nemo_toolkit[llm]==2.7.3' nemo_run 'leptonai<0.27' \\
        'datasets<4.5' 'pyarrow>=21,<23' 'protobuf~=5.29.5' \\
        'packaging<25' megatron-core==0.15.3 'setuptools<81'
    python benchmarks/nemo_parity.py ENV/bin/python [qwen2 qwen3 llama]

NeMo runs in ENV, this project in its own environment. For every family:

1. ``llm.import_ckpt`` writes a folder from a Hugging Face one. Our conversion of it must have the
   Hugging Face bits. Without Transformer Engine that importer loses the layer norms, so they are
   set in its model before it saves.
2. The same folder without that, and one with a missing norm, must be errors that name the tensor.
3. We write the folder; NeMo's ``io.load_context`` and ``ModelConnector.nemo_load`` read it. The
   tensors must have the bits of NeMo's own import, and the logits must equal those of transformers.

Four of NeMo's settings need a GPU (fused RoPE, fused permutation, grouped experts, persistent
norms). They are off while its objects are built here, and unchanged in the written files.
"""

from __future__ import annotations

import argparse
import json
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
IDS = torch.tensor([[3, 14, 15, 9, 2, 6, 5, 35, 8, 60]])
NORM = "decoder.layers.self_attention.linear_qkv.layer_norm_weight"
# NeMo's importers take from config.json neither the head size of Qwen3 nor Llama's rope scaling:
# those of its classes.
CHANGES = {
    "qwen2": {},
    "qwen3": {"head_dim": 128},
    "llama": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    },
}


# ---- in NeMo's environment ----


def build_without_te() -> None:
    """Let NeMo's configurations be made on a machine without Transformer Engine."""
    from megatron.core.transformer import TransformerConfig

    original = TransformerConfig.__post_init__

    def post_init(self: Any) -> None:
        self.apply_rope_fusion = self.moe_permute_fusion = self.moe_grouped_gemm = (
            self.persist_layer_norm
        ) = False
        original(self)

    TransformerConfig.__post_init__ = post_init


def unwrapped(model: Any) -> Any:
    while hasattr(model, "module"):
        model = model.module
    return model


def nemo_writes(family: str, hf: Path, out: Path, tensors: Path | None) -> None:
    """``llm.import_ckpt``; with ``tensors``, layer norms are set before it saves and all tensors go
    to that file.
    """
    from nemo.collections import llm
    from nemo.lightning.io.mixin import ConnectorMixin

    classes = {
        "qwen2": (llm.Qwen2Model, llm.Qwen2Config),
        "qwen3": (llm.Qwen3Model, llm.Qwen3Config),
        "llama": (llm.LlamaModel, llm.LlamaConfig),
    }
    model, config = classes[family]
    importer = ConnectorMixin._IMPORTERS[str(model) + "hf"]
    convert_state = importer.convert_state

    def with_norms(self: Any, source: Any, target: Any) -> Any:
        inner = unwrapped(target).bfloat16()  # local norms are made in float32
        result = convert_state(self, source, target)
        if tensors is not None:
            with torch.no_grad():
                for theirs, ours in zip(source.model.layers, inner.decoder.layers, strict=True):
                    ours.input_layernorm.weight.copy_(theirs.input_layernorm.weight)
                    ours.pre_mlp_layernorm.weight.copy_(theirs.post_attention_layernorm.weight)
            torch.save(
                {key: x for key, x in inner.state_dict().items() if torch.is_tensor(x)}, tensors
            )
        return result

    importer.convert_state = with_norms
    llm.import_ckpt(
        model(config=config(num_layers=2, hidden_size=64, num_attention_heads=8)),
        f"hf://{hf}",
        output_path=out,
    )


def nemo_reads(folder: Path, out: Path) -> None:
    """``io.load_context`` of the whole and of parts, then ``nemo_load``; tensors, logits and
    settings to ``out``.
    """
    from nemo.lightning import io
    from nemo.lightning.io import pl
    from nemo.lightning.io.connector import ModelConnector

    from spark_nemo.megatron.cpu_compat import seed_everything

    pl._fix_tensors_device = lambda checkpoint: checkpoint  # it asserts that CUDA runs
    context, config = io.load_context(folder), io.load_context(folder, subpath="model.config")
    tokenizer = io.load_context(folder, subpath="model.tokenizer")
    assert type(context.model.config) is type(config) and context.trainer.num_devices == 1
    model, _ = ModelConnector(folder).nemo_load(folder)
    inner = unwrapped(model)
    tensors = {key: x.clone() for key, x in inner.state_dict().items() if torch.is_tensor(x)}
    seed_everything(0)
    with torch.no_grad():
        logits = inner.float().eval()(IDS, torch.arange(IDS.shape[1])[None], None)
    torch.save(
        {
            "tensors": tensors,
            "logits": logits,
            "class": type(model).__name__,
            "config": type(config).__name__,
            "ids": tokenizer.text_to_ids("w1 w2"),
            "temperature": config.generation_config.temperature,
        },
        out,
    )


def inside(arguments: list[str]) -> None:
    """The part that NeMo's Python runs."""
    sys.path.insert(0, str(ROOT))
    from spark_nemo.megatron.cpu_compat import cuda_means_cpu

    with cuda_means_cpu():
        import nemo.collections.llm

        build_without_te()
        what, *rest = arguments
        if what == "write":
            family, hf, out, *tensors = rest
            nemo_writes(family, Path(hf), Path(out), Path(tensors[0]) if tensors else None)
        else:
            nemo_reads(Path(rest[0]), Path(rest[1]))
    assert nemo


# ---- in this project's environment ----


def make_hf(folder: Path, family: str) -> Any:
    """A bfloat16 model with random norms and biases, a tokenizer, and config.json as transformers 4
    reads it.
    """
    from safetensors.torch import load_file, save_file
    from tokenizers import Tokenizer, models, pre_tokenizers

    sys.path.insert(0, str(ROOT / "tests" / "megatron"))
    import family_cases

    family_cases.make_hf(family, folder, **CHANGES[family])
    weights = folder / "model.safetensors"
    save_file(
        {name: x.bfloat16() for name, x in load_file(weights).items()}, weights, {"format": "pt"}
    )
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "torch_dtype": "bfloat16"}
    if rope["rope_type"] != "default":
        config["rope_scaling"] = rope
    del config["dtype"]
    (folder / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if v is not None})
    )
    (folder / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.7}')
    tokenizer = Tokenizer(
        models.WordLevel({f"w{i}": i for i in range(60)} | {"?": 60}, unk_token="?")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "?"}'
    )


def run_nemo(python: Path, *arguments: object) -> None:
    result = subprocess.run(
        [python, __file__, "--inside", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=280,
    )
    if result.returncode:
        sys.exit(
            f"NeMo failed on {arguments}:\n"
            + "\n".join((result.stdout + result.stderr).splitlines()[-15:])
        )


def same_as_hf(hf: Path, nemo: Path, out: Path) -> tuple[int, int, list[str]]:
    """Tensors, tensors that differ, and those that only our conversion of ``nemo`` has."""
    from spark_nemo.megatron.checkpoint.conversion import convert
    from spark_nemo.megatron.hf_files import SafetensorsFolder

    ours, original = SafetensorsFolder(convert(nemo, out, "hf").folder), SafetensorsFolder(hf)
    assert set(original) <= set(ours)
    more = sorted(set(ours) - set(original))
    wrong = sum(not torch.equal(original[name], ours[name]) for name in original)
    # NeMo's importer of Qwen2 unties: its head is then a copy of the embedding.
    wrong += sum(not torch.equal(ours[name], ours["model.embed_tokens.weight"]) for name in more)
    return len(original), wrong, more


def error_of(source: Path, scratch: Path) -> str:
    from spark_nemo.config.errors import ConfigError
    from spark_nemo.megatron.checkpoint.conversion import convert

    try:
        convert(source, scratch / "none", "hf")
    except ConfigError as error:
        return str(error)
    return ""


def without_norm(folder: Path) -> None:
    from spark_nemo.megatron.checkpoint.safe_pickle import read_metadata

    metadata = read_metadata(folder / "weights" / ".metadata")
    del metadata.state_dict_metadata[f"module.{NORM}"]
    (folder / "weights" / ".metadata").write_bytes(pickle.dumps(metadata))


def check(python: Path, family: str, scratch: Path) -> bool:
    """One family, all three parts. Prints what was found."""
    from transformers import AutoModelForCausalLM

    from spark_nemo.megatron.checkpoint.conversion import convert

    hf, nemo, ours = scratch / "hf", scratch / "nemo", scratch / "ours"
    make_hf(hf, family)
    run_nemo(python, "write", family, hf, nemo, scratch / "nemo.pt")
    count, wrong, more = same_as_hf(hf, nemo, scratch / "back")
    print(
        f"{family}: NeMo wrote, we read: {count} tensors, {wrong} differ, also there: {more}",
        flush=True,
    )
    run_nemo(python, "read", convert(hf, ours, "nemo").folder, scratch / "ours.pt")
    found, expected = torch.load(scratch / "ours.pt"), torch.load(scratch / "nemo.pt")
    names = sorted(set(found["tensors"]) & set(expected))
    differ = sum(not torch.equal(found["tensors"][name], expected[name]) for name in names)
    only = sorted(set(found["tensors"]) ^ set(expected))
    reference = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    with torch.no_grad():
        gap = float((reference(IDS).logits - found["logits"]).abs().max())
    print(
        f"{family}: we wrote, NeMo read a {found['class']} with {found['config']}: "
        f"{len(names)} tensors, {differ} differ from its own import, in one only: {only}; "
        f"logits differ from transformers' by {gap:.1e}; tokens {found['ids']}, "
        f"temperature {found['temperature']}",
        flush=True,
    )
    without_norm(nemo)
    missing = error_of(nemo, scratch)
    run_nemo(python, "write", family, hf, scratch / "lost")
    lost = error_of(scratch / "lost", scratch)
    print(f"{family}: {missing}\n{family}: {lost}", flush=True)
    return not (
        wrong
        or differ
        or set(only) - {"output_layer.weight"}
        or gap > 1e-4
        or found["ids"] != [1, 2]
        or found["temperature"] != 0.7
        or f"lacks tensor {NORM}" not in missing
        or NORM not in lost
    )


def main() -> int:
    """0 when every family passes all three parts."""
    if sys.argv[1:2] == ["--inside"]:
        inside(sys.argv[2:])
        return 0
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("python", type=Path, help="of the environment with nemo-toolkit")
    parser.add_argument("families", nargs="*", default=list(CHANGES), metavar="family")
    given = parser.parse_args()
    if unknown := sorted(set(given.families) - set(CHANGES)):
        parser.error(f"{unknown[0]} is not one of {', '.join(CHANGES)}")
    version = (
        "from importlib.metadata import version as v; print(v('nemo_toolkit'), v('megatron-core'))"
    )
    found = (
        subprocess.run([given.python, "-c", version], capture_output=True, text=True)
        if given.python.is_file()
        else None
    )
    if found is None or found.returncode:
        sys.exit(
            f"{given.python} is not a Python with nemo-toolkit and megatron-core; --help tells how "
            "to make one"
        )
    print(f"nemo-toolkit and megatron-core: {found.stdout.strip()}", flush=True)
    passed = []
    for family in given.families:
        with tempfile.TemporaryDirectory() as scratch:
            passed.append(check(given.python, family, Path(scratch)))
    print("passed" if all(passed) else "FAILED")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
