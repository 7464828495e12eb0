"""NeMo 2's checkpoint folder, read and written without nemo-toolkit.

``weights/`` is a torch_dist checkpoint whose keys start with "module.". ``context/`` has
``model.yaml`` (the model's configuration under the names of NeMo's classes, with defaults),
``io.json`` (from which NeMo builds its objects, see ``nemo_io``), ``nemo_tokenizer/`` and
``artifacts/``. benchmarks/nemo_parity.py checks this module against nemo-toolkit.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import yaml

from spark_nemo.config.errors import ConfigError
from spark_nemo.models.hf_folder import copy_companions
from spark_nemo.models.spec import ModelSpec

from .nemo_io import IO_JSON, call, io_json, plain_values, symbol
from .torch_dist_reader import EMBEDDING, StoredCheckpoint

WEIGHTS = "weights"
CONTEXT = "context"
MODEL_YAML = "model.yaml"
PREFIX = "module."
TOKENIZER = "nemo_tokenizer"
ARTIFACTS = "artifacts"
_MODELS = "nemo.collections.llm.gpt.model."
_CLASSES = {
    "qwen2": ("qwen2.Qwen2Model", "qwen2.Qwen2Config"),
    "qwen3": ("qwen3.Qwen3Model", "qwen3.Qwen3Config"),
    "qwen3_moe": ("qwen3.Qwen3Model", "qwen3.Qwen3MoEConfig"),
    "llama": ("llama.LlamaModel", "llama.Llama3Config"),
}
_LLAMA31 = "llama.Llama31Config"
_ARCHITECTURES = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "llama": "LlamaForCausalLM",
}
_SAME = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "rms_norm_eps": "layernorm_epsilon",
    "rope_theta": "rotary_base",
    "initializer_range": "init_method_std",
    "tie_word_embeddings": "share_embeddings_and_output_weights",
}
"""Hugging Face's names of the settings, to NeMo's names."""
_INPUT_NORM = "decoder.layers.self_attention.linear_qkv.layer_norm_weight"
_FINAL_NORM = "decoder.final_layernorm.weight"
_FIXED = {
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "add_bias_linear": False,
    "position_embedding_type": "rope",
}


def write_context(
    folder: Path,
    hf_config: dict[str, Any],
    spec: ModelSpec,
    dtype: torch.dtype,
    sources: tuple[Path, ...],
) -> None:
    """Write ``folder/context``; with config.json in ``artifacts/`` the way back needs no more."""
    context = folder / CONTEXT
    for sub in (TOKENIZER, ARTIFACTS):
        (context / sub).mkdir(parents=True, exist_ok=True)
    for source in sources:
        copy_companions(source, context / TOKENIZER)
    for name in ("generation_config.json", "config.json"):
        (context / TOKENIZER / name).unlink(missing_ok=True)
        for source in sources:
            if (source / name).is_file():
                (context / ARTIFACTS / name).write_bytes((source / name).read_bytes())
    config = {key: value for key, value in hf_config.items() if key != "auto_map"}
    (context / ARTIFACTS / "config.json").write_text(json.dumps(config, indent=2))
    model = _model_yaml(spec, dtype, context)
    (context / MODEL_YAML).write_text(yaml.safe_dump(model, sort_keys=True))
    (context / IO_JSON).write_text(
        io_json({key: value for key, value in model.items() if value is not None})
    )


def check_norms(stored: StoredCheckpoint) -> None:
    """Raise ``ConfigError`` for layer norms that NeMo's import left at 1.

    Without Transformer Engine the import does not find tensors of their names and only warns; the
    final norm's name is the same in both cases and is imported. A new model has ones in both.
    """
    norms = [stored.prefix + key for key in (_INPUT_NORM, _FINAL_NORM)]
    if any(key not in stored.tensors for key in norms):
        return  # check_stored_shapes names missing tensors
    input_is_ones, final_is_ones = (bool((stored.read(key) == 1).all()) for key in norms)
    if input_is_ones and not final_is_ones:
        raise ConfigError(
            f"{stored.folder}: tensor {norms[0]} is 1 everywhere, {norms[1]} is not: NeMo's import "
            "loses layer norms without Transformer Engine; import the model again with it, or with "
            "tools/convert_hf_to_megatron.py --to nemo"
        )


def companions(folder: Path) -> tuple[Path, ...]:
    """Return the folders of a NeMo checkpoint with tokenizer and generation files."""
    found = (folder / CONTEXT / TOKENIZER, folder / CONTEXT / ARTIFACTS)
    return tuple(path for path in found if path.is_dir())


def hf_config(folder: Path, stored: StoredCheckpoint) -> dict[str, Any]:
    """Return the config.json in the checkpoint, checked against model.yaml, else one made from it.

    Raises ``ConfigError`` naming the missing or unsupported key of model.yaml.
    """
    path = folder / CONTEXT / MODEL_YAML
    made = _from_yaml(path, stored)
    carried = folder / CONTEXT / ARTIFACTS / "config.json"
    if not carried.is_file():
        return made
    try:
        config = json.loads(carried.read_text())
    except ValueError as error:
        raise ConfigError(f"{carried} is not JSON: {error}") from error
    carried_spec = ModelSpec.from_hf(config, str(carried))
    yaml_spec = ModelSpec.from_hf(made, str(path))
    for field in fields(ModelSpec):
        a = getattr(carried_spec, field.name)
        b = getattr(yaml_spec, field.name)
        if a != b:
            raise ConfigError(
                f"{path} says {field.name}={b}, {carried} says {a}: correct one of them"
            )
    return config


def _model_yaml(spec: ModelSpec, dtype: torch.dtype, context: Path) -> dict[str, Any]:
    """Return the tree of model.yaml.

    It names tokenizer and generation settings when ``context`` has their files.
    """
    model, config = _CLASSES[spec.family]
    values: dict[str, Any] = {
        **_FIXED,
        "num_layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "ffn_hidden_size": spec.ffn_size,
        "num_attention_heads": spec.num_heads,
        "num_query_groups": spec.num_kv_heads,
        "kv_channels": spec.head_dim,
        "vocab_size": spec.vocab_size,
        "make_vocab_size_divisible_by": 1,
        "seq_length": spec.max_positions,
        "layernorm_epsilon": spec.norm_eps,
        "rotary_base": spec.rope_theta,
        "init_method_std": spec.init_std,
        "share_embeddings_and_output_weights": spec.tied_embeddings,
        "add_qkv_bias": spec.qkv_bias,
        "qk_layernorm": spec.qk_norm,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "params_dtype": symbol(str(dtype)),
        "activation_func": symbol("torch.nn.functional.silu"),
    }
    if spec.family.startswith("qwen3"):
        # NeMo's class has its own default for this second name of seq_length.
        values["max_position_embeddings"] = spec.max_positions
    scaling = spec.rope_scaling
    if scaling:
        config = _LLAMA31
        values |= {
            "scale_factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "old_context_len": scaling.original_max_positions,
        }
    experts = spec.experts
    if experts:
        values |= {
            "num_moe_experts": experts.count,
            "moe_router_topk": experts.per_token,
            "moe_ffn_hidden_size": experts.ffn_size,
            "moe_router_pre_softmax": not experts.normalize_weights,
        }
    if (context / ARTIFACTS / "generation_config.json").is_file():
        values["generation_config"] = call(
            "nemo.lightning.io.artifact.hf_auto.from_pretrained",
            pretrained_model_name_or_path=f"./{ARTIFACTS}",
            auto_cls=symbol("transformers.generation.configuration_utils.GenerationConfig"),
        )
    tokenizer = None
    if (context / TOKENIZER / "tokenizer_config.json").is_file():
        tokenizer = call(
            "nemo.collections.common.tokenizers.huggingface.auto_tokenizer.AutoTokenizer",
            pretrained_model_name=TOKENIZER,
        )
    return call(
        _MODELS + model,
        config=call(_MODELS + config, **values),
        tokenizer=tokenizer,
        optim=None,
        model_transform=None,
    )


def _from_yaml(path: Path, stored: StoredCheckpoint) -> dict[str, Any]:
    config = _read_config(path)
    for key, value in plain_values(path.parent, "model.config").items():
        if key in config and config[key] != value:
            raise ConfigError(
                f"{path} says {key}={config[key]!r}, {path.parent / IO_JSON}, which NeMo reads, "
                f"says {value!r}: correct one of them"
            )

    def get(key: str) -> Any:
        if config.get(key) is None:
            raise ConfigError(f"{path}: config has no {key}")
        return config[key]

    for key, only in _FIXED.items():
        if get(key) != only:
            raise ConfigError(f"{path}: {key}={config[key]!r} is not supported, only {only!r}")
    family = _family(get("_target_"), config, path)
    rows = stored.tensors[stored.prefix + EMBEDDING].shape[0]
    hf: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[family]],
        "model_type": family,
        "hidden_act": "silu",
        "vocab_size": config.get("vocab_size") or rows,
        "use_sliding_window": False,
        "max_position_embeddings": config.get("max_position_embeddings") or get("seq_length"),
        **{name: get(theirs) for name, theirs in _SAME.items()},
    }
    hf["head_dim"] = config.get("kv_channels") or get("hidden_size") // get("num_attention_heads")
    if family == "llama" and config.get("scale_factor") is not None:
        hf["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": get("scale_factor"),
            "low_freq_factor": get("low_freq_factor"),
            "high_freq_factor": get("high_freq_factor"),
            "original_max_position_embeddings": get("old_context_len"),
        }
    if family == "qwen3_moe":
        hf |= {
            "num_experts": get("num_moe_experts"),
            "num_experts_per_tok": get("moe_router_topk"),
            "moe_intermediate_size": get("moe_ffn_hidden_size"),
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": not config.get("moe_router_pre_softmax", False),
        }
    return hf


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text())["config"]
    except FileNotFoundError as error:
        hint = ""
        if (path.parent / IO_JSON).is_file():
            hint = " (io.json alone leaves out the defaults of NeMo's classes)"
        raise ConfigError(
            f"{path} is missing{hint}: pass --hf-config with a folder that has the model's "
            "config.json"
        ) from error
    except (yaml.YAMLError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is damaged: {str(error).splitlines()[0]}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} is damaged: config is a {type(config).__name__}")
    return config


def _family(target: str, config: dict[str, Any], path: Path) -> str:
    for module, family in (
        ("qwen2.Qwen2", "qwen2"),
        ("qwen3.Qwen3", "qwen3"),
        ("llama.Llama", "llama"),
    ):
        if str(target).startswith(_MODELS + module):
            return "qwen3_moe" if family == "qwen3" and config.get("num_moe_experts") else family
    raise ConfigError(
        f"{path}: {target} is not a supported model, only NeMo's qwen2, qwen3 and llama"
    )
