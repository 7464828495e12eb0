"""Model families in one process: parity with transformers, names in checkpoints, and errors.

The other layouts: test_families_eight_ranks.py. Nothing here runs on a GPU or with Transformer
Engine, whose names are checked against what megatron-core writes without it.
"""

import dataclasses
import json
import math
import queue
import shutil
from pathlib import Path

import family_cases as cases
import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from safetensors.torch import load_file, save_file

from spark_nemo.config import MegatronConfig
from spark_nemo.config.errors import ConfigError
from spark_nemo.engines.base import EngineFailure
from spark_nemo.engines.local import LocalEngine
from spark_nemo.megatron.checkpoint.conversion import convert
from spark_nemo.megatron.checkpoint.global_tensors import GlobalTensors, check_stored_shapes
from spark_nemo.megatron.checkpoint.reshard import reshard
from spark_nemo.megatron.checkpoint.torch_dist_reader import StoredCheckpoint
from spark_nemo.megatron.cpu_compat import cuda_means_cpu
from spark_nemo.megatron.hf_files import SafetensorsFolder
from spark_nemo.megatron.param_shards import from_gathered, to_shards
from spark_nemo.megatron.rope import inverse_frequencies
from spark_nemo.megatron.worker import MegatronWorker
from spark_nemo.models.families import FAMILIES
from spark_nemo.models.hf_config import read_hf_config
from spark_nemo.models.param_mapping import hf_tensor_shapes, map_params
from spark_nemo.models.spec import ModelSpec

ONE = MegatronConfig(dtype="float32", distributed_optimizer=False)
VARIANTS = {
    "qwen2_untied": ("qwen2", {"tie_word_embeddings": False}),
    "qwen3_one_kv_head": ("qwen3", {"num_key_value_heads": 1}),
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "llama_not_stretched": (
        "llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    ),
    "moe_weights_as_they_are": ("qwen3_moe", {"norm_topk_prob": False}),
}
NUMBERS = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 8,
    "head_dim": 8,
    "num_key_value_heads": 2,
    "vocab_size": 67,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "norm_topk_prob": True,
}

DEFAULT = {"rope_type": "default", "rope_theta": 1e6}
PUBLISHED = {
    "qwen2.5-7b": 15231233024,
    "qwen3-32b": 65524246528,
    "llama-3.1-70b": 141107412992,
    "qwen3-30b-a3b": 61064245248,
}
"""metadata.total_size in the model.safetensors.index.json of these models on huggingface.co: bytes
in bfloat16.
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of every family with transformers' numbers."""
    torch.set_num_threads(1)
    folders = {family: tmp_path_factory.mktemp(family) for family in cases.FAMILIES}
    for family, folder in folders.items():
        cases.write_reference(family, folder)
    return folders


def check(folder, layout=ONE):
    result = cases.compare(folder, layout)
    assert result["export"] == 0 and result["logprobs"] <= 1e-4, result
    assert all(result[name] <= 1e-5 for name in ("loss", "grads", "grad_norm")), result


@pytest.mark.parametrize("family", cases.FAMILIES)
def test_equals_transformers(folders, family):
    """Log-probabilities, loss, every gradient and the export equal transformers' own model of the
    family; the bfloat16 copy comes back bit for bit, and recomputing the MLP or the experts changes
    nothing. Norms, biases and routers are random: at their initial values they hide mistakes.
    """
    check(folders[family])
    check(folders[family], dataclasses.replace(ONE, recompute_granularity="selective"))
    assert cases.export_bfloat16(folders[family], MegatronConfig())[0] == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_equal_transformers(tmp_path, variant):
    """Tied and untied embeddings, one key-value head, Llama without scaled frequencies, experts weighted
    as they are.
    """
    family, changes = VARIANTS[variant]
    cases.write_reference(family, tmp_path, **changes)
    check(tmp_path)


@pytest.mark.parametrize("family", cases.FAMILIES)
def test_checkpoint_names_are_the_rules_last_names(folders, family):
    """The keys and shapes that megatron-core writes into a distributed checkpoint follow from the
    mapping: the Transformer Engine name without the layer, stacked over layers and experts;
    and the values of a layer are ``to_shards(..., 1)``. Converters rely on it. Transformer Engine
    itself is not here to ask.
    """
    worker = MegatronWorker.from_hf(folders[family], ONE, seed=0)
    spec, tensors = worker.spec, load_file(folders[family] / "model.safetensors")
    written = {}
    for entry in worker.model.sharded_state_dict().values():
        for shard in cases.shards_of(entry):
            written.setdefault(shard.key, []).append(shard)
    assert all("_extra_state" in key or key in cases.checkpoint_keys(spec) for key in written)
    for key, (stacked, param) in cases.checkpoint_keys(spec).items():
        global_tensor = to_shards(
            param.split, [tensors[name] for name in param.hf_shapes], spec, 1
        )[0]
        assert {shard.global_shape for shard in written[key]} == {
            (*stacked, *global_tensor.shape)
        }, key
        own = [shard for shard in written[key] if not any(shard.global_offset[: len(stacked)])]
        values = torch.cat([s.data.reshape(-1, *global_tensor.shape[1:]) for s in own])
        assert torch.equal(values, global_tensor), key


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
def test_layers_that_are_stored_one_by_one_are_read(folders, tmp_path, family):
    """megatron-core gives every layer keys of its own when --moe-layer-freq is a list, as in
    slime's scripts for Qwen3-MoE. What its own saver then writes becomes the same Hugging Face
    tensors; resharding it is an error, and so are the finer pieces of
    singleton_local_shards. One rank, without an optimizer.
    """
    model = MegatronWorker.from_hf(folders[family], ONE, seed=0).model
    (tmp_path / "apart").mkdir()
    with cuda_means_cpu():
        filesystem_async._results_queue = queue.Queue()  # instead of a process for it
        state = model.sharded_state_dict(
            metadata={"singleton_local_shards": False, "non_homogeneous_layers": True}
        )
        dist_checkpointing.save(state, str(tmp_path / "apart"), ("torch_dist", 1))
    stored = StoredCheckpoint(tmp_path / "apart")
    assert "decoder.layers.1.self_attention.linear_proj.weight" in stored.tensors
    hf = SafetensorsFolder(
        convert(tmp_path / "apart", tmp_path / "hf", "hf", hf_config_from=folders[family]).folder
    )
    original = SafetensorsFolder(folders[family])
    assert set(hf) == set(original) and all(
        torch.equal(hf[name], original[name]) for name in original
    )
    with pytest.raises(ConfigError, match="non_homogeneous_layers"):
        reshard(tmp_path / "apart", tmp_path / "out", ONE, folders[family])
    names = {f"{name}_w" if name.endswith("fc1.weight") else name: () for name in stored.tensors}
    expected = GlobalTensors.like(ModelSpec.from_hf(read_hf_config(folders[family])), names)
    with pytest.raises(
        ConfigError, match=r"lacks tensor .*linear_fc1.weight.* singleton_local_shards"
    ):
        check_stored_shapes(names, expected, "here")


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("family", cases.FAMILIES)
def test_transforms_are_inverses(family, tp):
    """For every rule, shards put below each other give back the Hugging Face tensors, and what is
    cut has equal shards; also with four ranks per key-value head. Every element has a number of its
    own.
    """
    spec = ModelSpec.from_hf({"model_type": family, **NUMBERS})
    for param in map_params(spec):
        tp = 1 if param.expert is not None else tp
        tensors = [
            torch.arange(torch.Size(size).numel()).view(size) + 1
            for size in param.hf_shapes.values()
        ]
        shards = to_shards(param.split, tensors, spec, tp)
        assert len(shards) == tp and len({shard.shape for shard in shards}) == 1
        gathered = shards[0] if param.split.shard_dim is None else torch.cat(shards)
        for tensor, back in zip(
            tensors, from_gathered(param.split, gathered, spec, tp), strict=True
        ):
            assert torch.equal(tensor, back), param.hf_shapes


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_expert_is_somewhere(stages, ranks):
    """For any number of expert-parallel ranks, every Hugging Face tensor has one place, and no rank
    has two under one name.
    """
    spec = ModelSpec.from_hf({"model_type": "qwen3_moe", **NUMBERS})
    rules = list(map_params(spec, stages, ranks))
    names = [name for param in rules for name in param.hf_shapes]
    assert sorted(names) == sorted(hf_tensor_shapes(spec)) and len(names) == len(set(names))
    places = [(p.stage, p.expert_rank, name) for p in rules for name in p.megatron_names]
    assert len(places) == len(set(places))
    assert {p.expert_rank for p in rules} == {None, *range(ranks)}


@pytest.mark.parametrize("model", PUBLISHED)
def test_mapped_tensors_have_the_published_size(model):
    """The mapped tensors have together exactly the bytes that the published checkpoint
    says it has. Their names are those of transformers, which wrote the folders of the other tests.
    """
    config = json.loads(
        (Path(__file__).parents[1] / f"weight_sync/shapes/{model}.json").read_text()
    )
    shapes = hf_tensor_shapes(ModelSpec.from_hf(config))
    assert 2 * sum(math.prod(size) for size in shapes.values()) == PUBLISHED[model]


@pytest.mark.parametrize(
    "stretch",
    [
        {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        {
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        {
            "factor": 2.5,
            "low_freq_factor": 0.5,
            "high_freq_factor": 3.0,
            "original_max_position_embeddings": 1000,
        },
    ],
    ids=["llama3.1", "llama3.2", "other"],
)
@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_frequencies_equal_transformers(stretch, key):
    """Llama's scaled frequencies equal transformers' for the published settings and
    for others, read from the config of transformers 4 (rope_scaling and rope_theta) and 5
    (rope_parameters).
    """
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "rope_theta": 500000.0, **stretch}
    sizes = {
        "hidden_size": 1024,
        "num_attention_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072,
    }
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(**sizes, rope_parameters=rope), "cpu")
    if key == "rope_scaling":
        rope.pop("rope_theta")
    config = {"model_type": "llama", **NUMBERS, **sizes, "rope_theta": 500000.0, key: rope}
    ours = inverse_frequencies(ModelSpec.from_hf(config))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    plain = inverse_frequencies(dataclasses.replace(ModelSpec.from_hf(config), rope_scaling=None))
    assert (ours < 0.9 * plain).any() and (ours == plain).any()


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        (
            "qwen2",
            {"use_sliding_window": True},
            "use_sliding_window=True is not supported for qwen2, only False",
        ),
        (
            "qwen3",
            {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types has 'sliding_attention'",
        ),
        (
            "qwen2",
            {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            "rope type 'yarn' is not supported for qwen2",
        ),
        (
            "qwen3",
            {"rope_parameters": {"rope_type": "llama3"}},
            "rope type 'llama3' is not supported for qwen3",
        ),
        (
            "llama",
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "rope type 'llama3' lacks 'low_freq_factor'",
        ),
        ("llama", {"attention_bias": True}, "attention_bias=True is not supported for llama"),
        ("llama", {"mlp_bias": True}, "mlp_bias=True is not supported for llama"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        (
            "llama",
            {"hidden_act": "gelu"},
            "hidden_act='gelu' is not supported for llama, only 'silu'",
        ),
        (
            "qwen2",
            {"quantization_config": {"quant_method": "awq"}},
            "quant_method='awq' is not supported, only",
        ),
        (
            "qwen3",
            {"rope_parameters": DEFAULT, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            "has rope_parameters and rope_scaling, which differ",
        ),
        (
            "qwen3",
            {"rope_parameters": DEFAULT, "rope_scaling": {"rope_type": "default"}},
            "which differ: keep one",
        ),
        (
            "qwen3",
            {"rope_parameters": DEFAULT, "rope_theta": 5e5},
            "rope_theta=500000.0, but rope_parameters says 100",
        ),
        ("qwen2", {"rope_scaling": "linear"}, "rope_scaling='linear' is not a set of settings"),
        ("qwen2", {"rope_parameters": [1]}, r"rope_parameters=\[1\] is not a set of settings"),
        ("llama", {"rope_theta": [1]}, r"rope_theta=\[1\] must be a positive number"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "rope_theta": -5}},
            "rope_theta=-5 must be a positive",
        ),
        ("llama", {"rms_norm_eps": "1e-6"}, "rms_norm_eps='1e-6' must be a positive number"),
        ("llama", {"initializer_range": "a"}, "initializer_range='a' must be a positive number"),
        (
            "llama",
            {"tie_word_embeddings": "false"},
            "tie_word_embeddings='false' must be true or false",
        ),
        ("qwen3", {"layer_types": 3}, "layer_types=3 is not a list"),
        ("qwen3", {"layer_types": [["x"]]}, r"layer_types has \['x'\], which is not supported"),
        ("qwen3_moe", {"num_experts_per_tok": "2"}, "num_experts=4, num_experts_per_tok='2'"),
        ("qwen3_moe", {"norm_topk_prob": "false"}, "norm_topk_prob='false' must be true or false"),
        (["llama"], {}, r"model_type=\['llama'\] is not supported"),
        ("qwen3", {"head_dim": None}, "has no 'head_dim'"),
        (
            "qwen3",
            {"num_key_value_heads": 3},
            "num_key_value_heads=3 does not divide num_attention_heads=8",
        ),
        ("qwen3", {"vocab_size": "67"}, "vocab_size='67' must be a positive whole number"),
        (
            "qwen3_moe",
            {"mlp_only_layers": [0]},
            r"mlp_only_layers=\[0\] is not supported for qwen3_moe, only \[\]",
        ),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2 is not supported"),
        ("qwen3_moe", {"num_experts": None}, "has no 'num_experts'"),
        ("qwen3_moe", {"num_experts_per_tok": 5}, "num_experts=4, num_experts_per_tok=5"),
        (
            "mistral",
            {},
            "model_type='mistral' is not supported, only qwen2, qwen3, llama, qwen3_moe",
        ),
    ],
)
def test_unsupported_settings_are_named(family, change, message):
    """An unsupported setting is an error that names it and its file: ignoring it would train another
    model.
    """
    with pytest.raises(ConfigError, match=f"^some/config.json:? .*{message}"):
        ModelSpec.from_hf({"model_type": family, **NUMBERS, **change}, "some/config.json")


def test_a_config_for_two_versions_of_transformers_is_read():
    """The same rotary settings under the names of transformers 4 and 5, and null settings, are no
    contradiction.
    """
    stretch = {key: value for key, value in cases.LLAMA3.items() if key != "rope_theta"}
    both = {
        "rope_parameters": cases.LLAMA3,
        "rope_scaling": stretch,
        "rope_theta": 10000,
        "num_local_experts": None,
    }
    one = ModelSpec.from_hf({"model_type": "llama", **NUMBERS, "rope_parameters": cases.LLAMA3})
    assert ModelSpec.from_hf({"model_type": "llama", **NUMBERS, **both}) == one
    mixture = ModelSpec.from_hf(
        {"model_type": "qwen3_moe", **NUMBERS, "num_local_experts": None, "rope_theta": None}
    )
    assert mixture.experts.count == 4 and mixture.rope_theta == 10000.0


@pytest.mark.parametrize(
    ("family", "layout", "message"),
    [
        (
            "llama",
            {"tensor_parallel": 3},
            r"tensor_parallel=3 .* 8 attention heads \(self_attn.q_proj\), 2 key-value heads "
            r".* ffn size 96 \(mlp.gate_proj\): choose one of 1, 2, 4, 8$",
        ),
        ("llama", {"tensor_parallel": 16}, "tensor_parallel=16 does not divide"),
        (
            "qwen3",
            {"pipeline_parallel": 3},
            "pipeline_parallel=3 does not divide the model's 2 layers",
        ),
        (
            "qwen3",
            {"expert_parallel": 2, "data_parallel": 2},
            "expert_parallel=2 has no effect .*qwen3, which has no",
        ),
        (
            "qwen3_moe",
            {"expert_parallel": 3, "data_parallel": 3},
            "expert_parallel=3 does not divide .* 4 experts",
        ),
        (
            "qwen3_moe",
            {"expert_parallel": 4, "data_parallel": 2},
            "expert_parallel=4 does not divide .* data_parallel = 2",
        ),
        (
            "qwen3_moe",
            {"tensor_parallel": 2},
            "tensor_parallel=2 with experts needs megatron.sequence_parallel=true",
        ),
    ],
)
def test_layouts_that_do_not_fit_are_refused(family, layout, message):
    """A split that the model does not allow names the setting, the tensors behind it and the
    allowed values.
    """
    spec = ModelSpec.from_hf({"model_type": family, **NUMBERS})
    with pytest.raises(ConfigError, match=f"^megatron.{message}"):
        spec.check_layout(MegatronConfig(**layout))


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("qwen3", "model.layers.1.self_attn.k_norm.weight"),
        ("llama", "model.layers.0.post_attention_layernorm.weight"),
        ("qwen3_moe", "model.layers.1.mlp.gate.weight"),
        ("qwen3_moe", "model.layers.0.mlp.experts.3.up_proj.weight"),
    ],
)
def test_missing_tensors_are_named(folders, tmp_path, family, name):
    """A norm, router or expert that a folder lacks stops the load with its name: nothing is left at
    a default.
    """
    shutil.copy(folders[family] / "config.json", tmp_path)
    tensors = load_file(folders[family] / "model.safetensors")
    tensors.pop(name)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=f"lacks tensor {name}$"):
        MegatronWorker.from_hf(tmp_path, ONE, seed=0)


def test_another_family_s_tensors_are_named(folders, tmp_path):
    """A Llama folder that calls itself Qwen2 lacks the biases; a Qwen2 one that calls itself Llama
    has them over.
    """
    for config, weights, message in (
        ("qwen2", "llama", "lacks tensor model.layers.0.self_attn.k_proj.bias"),
        ("llama", "qwen2", "lacks tensor lm_head.weight"),
    ):
        shutil.copy(folders[config] / "config.json", tmp_path)
        shutil.copy(folders[weights] / "model.safetensors", tmp_path)
        with pytest.raises(ConfigError, match=message):
            MegatronWorker.from_hf(tmp_path, ONE, seed=0)


def test_embedding_head_and_tokenizer_must_agree(folders, tmp_path):
    """An embedding of another height, a tied model with a head of its own, and a token beyond the
    embedding are named; a stored copy of a tied head and spare rows are fine.
    """
    shutil.copytree(folders["qwen2"], tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")

    def load(changes=None, tokens=None):
        save_file({**tensors, **(changes or {})}, tmp_path / "model.safetensors")
        (tmp_path / "tokenizer.json").write_text(
            json.dumps({"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": tokens or []})
        )
        return MegatronWorker.from_hf(tmp_path, ONE, seed=0)

    embedding = tensors["model.embed_tokens.weight"]
    load({"lm_head.weight": embedding.clone()}, [{"id": 66, "content": "<last>"}])
    with pytest.raises(
        ConfigError, match=r"tensor model.embed_tokens.weight in .* \(70, 64\), config.json says"
    ):
        load({"model.embed_tokens.weight": torch.zeros(70, 64)})
    with pytest.raises(
        ConfigError, match=r"tensor lm_head.weight in .* is not model.embed_tokens.weight"
    ):
        load({"lm_head.weight": embedding + 1})
    with pytest.raises(
        ConfigError, match=r"token '<new>' with id 67, but tensor model.embed_tokens.weight has 67"
    ):
        load(tokens=[{"id": 67, "content": "<new>"}])


def test_the_embedded_engine_says_what_it_serves(folders):
    """The error for another family than Qwen2 names the engine to choose."""
    with pytest.raises(
        EngineFailure, match=r"model_type='qwen3': .*serves qwen2 only; use engine.kind=sglang"
    ):
        LocalEngine.from_folder(folders["qwen3"], max_batch_size=1, max_context=8)


def test_every_family_knows_its_own_name():
    """A family is found by config.json's model_type, and its rules are used."""
    assert all(name == family.model_type for name, family in FAMILIES.items())
    moe = hf_tensor_shapes(ModelSpec.from_hf({"model_type": "qwen3_moe", **NUMBERS}))
    assert (
        "model.layers.1.mlp.experts.3.down_proj.weight" in moe
        and "model.layers.0.mlp.up_proj.weight" not in moe
    )
