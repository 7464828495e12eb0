"""``spark-nemo plan``: published layouts, errors, and its figures against transformers and torch.

No figure here was compared with a GPU. The memory of a trainer's rank is measured in
tests/megatron/test_sizing.py.
"""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from published_layouts import ACCEPTED, LIMIT_70B, LONGEST_70B, SFT_70B

from spark_nemo.cli.main import main
from spark_nemo.config import ConfigError, MegatronConfig, RLConfig, SamplingConfig, SparkConfig
from spark_nemo.config.registry import choose
from spark_nemo.config.sft import SftConfig
from spark_nemo.models.spec import ModelSpec
from spark_nemo.planning import memory_check
from spark_nemo.planning.capacity_planner import plan_capacity
from spark_nemo.planning.cluster import Cluster, Rates
from spark_nemo.planning.engine_memory import engine_weight_bytes, kv_bytes_per_token
from spark_nemo.planning.step_time import forward_flops_per_token
from spark_nemo.planning.workload import Model
from spark_nemo.run.compose import compose_config
from spark_nemo.toy.resolve import resolve_toy

SHAPES = Path(__file__).parents[1] / "weight_sync" / "shapes"


def model(name):
    config = json.loads((SHAPES / f"{name}.json").read_text())
    return Model(name, ModelSpec.from_hf(config))


def layout(published, gpus, **changed):
    ranks = published.tensor_parallel * published.pipeline_parallel
    return MegatronConfig(
        **{
            "tensor_parallel": published.tensor_parallel,
            "pipeline_parallel": published.pipeline_parallel,
            "data_parallel": max(1, gpus // ranks),
            "tokens_per_micro_batch": published.tokens,
            "sequence_parallel": published.sequence_parallel and published.tensor_parallel > 1,
            "recompute_granularity": published.recompute,
            "grad_reduce_dtype": published.gradients,
            **changed,
        }
    )


def check(published, cluster, tmp_path, **changed):
    """``spark-nemo plan --stage sft --check`` of a published layout on ``cluster``."""
    (tmp_path / "config.json").write_text((SHAPES / f"{published.model}.json").read_text())
    config = SparkConfig(
        megatron=layout(published, cluster.gpus, **changed),
        sft=SftConfig(max_length=published.longest, batch_size=published.batch),
    )
    return plan_capacity(config, "sft", cluster, Rates(), model=str(tmp_path), check=True)


@pytest.mark.parametrize("published", ACCEPTED, ids=lambda p: p.source)
def test_published_layouts_fit_and_not_on_a_quarter(published, tmp_path):
    """The trainer of every recipe fits H100s of 80 GB as published, and not a quarter of its GPUs.

    Two 8B recipes really fit a quarter. Activations are counted as our kernels keep them; nothing
    was run on a GPU.
    """
    cluster = Cluster(published.nodes)
    assert check(published, cluster, tmp_path).layouts
    quarter = Cluster(1, cluster.gpus // 4) if cluster.gpus <= 32 else Cluster(published.nodes // 4)
    if published.quarter_fits:
        assert check(published, quarter, tmp_path).layouts
    else:
        with pytest.raises(
            ConfigError, match=r"GB too much|megatron.* needs [0-9]+ GPUs and [0-9]+ of"
        ):
            check(published, quarter, tmp_path)


@pytest.mark.parametrize(
    "published", [p for p in ACCEPTED if "grpo" in p.source], ids=lambda p: p.source
)
def test_rl_on_a_quarter_lacks_gpus_for_its_servers(published, tmp_path):
    """A quarter is too small for every GRPO recipe, also where the trainer alone would fit.

    Here the policy's servers have GPUs of their own; NeMo-RL's share the trainer's.
    """
    (tmp_path / "config.json").write_text((SHAPES / f"{published.model}.json").read_text())
    quarter = Cluster(1, published.nodes * 8 // 4)
    rl = RLConfig(
        reward=choose("rl/reward", "majority"),
        prompts_per_step=64,
        group_size=32,
        loss=choose("rl/loss", "clipped", num_minibatches=4),
        sampling=SamplingConfig(max_new_tokens=3072),
    )
    for data_parallel in (
        1,
        max(1, quarter.gpus // (published.tensor_parallel * published.pipeline_parallel)),
    ):
        config = SparkConfig(rl=rl, megatron=layout(published, 1, data_parallel=data_parallel))
        with pytest.raises(
            ConfigError, match=r"GB too much|megatron.* needs [0-9]+ GPUs|does not fit an engine"
        ):
            plan_capacity(config, "stage3", quarter, Rates(), model=str(tmp_path), check=True)


@pytest.mark.parametrize("source", ["LLAMA3_8B_SFT", "LLAMA3_70B_SFT", SFT_70B])
def test_gradients_in_bfloat16_are_why_they_fit(source, tmp_path):
    """Three recipes fit because they keep their gradients in bfloat16.

    With float32, our default, they do not fit, and the error names the setting that would help.
    """
    (published,) = [each for each in ACCEPTED if source in each.source]
    with pytest.raises(
        ConfigError, match=r"megatron\.grad_reduce_dtype=bfloat16 saves [0-9.]+ GB: fits"
    ):
        check(published, Cluster(published.nodes), tmp_path, grad_reduce_dtype="float32")


def test_longest_sequence_decides(tmp_path):
    """NeMo-RL's 70B SFT does not fit at its limit of 4,096 tokens; its data are shorter.

    The error names the longest sequence that fits: that length passes, 16 tokens more do not.
    """
    (published,) = [each for each in ACCEPTED if each.source == SFT_70B]
    with pytest.raises(ConfigError, match=r"17\.4 GB too much") as raised:
        check(replace(published, tokens=LIMIT_70B), Cluster(8), tmp_path)
    found = re.search(
        r"sequences and micro-batches of ([0-9,]+) tokens instead of 4,096: fits",
        str(raised.value),
    )
    longest = int(found[1].replace(",", ""))
    assert LONGEST_70B <= longest < LIMIT_70B
    assert check(replace(published, tokens=longest), Cluster(8), tmp_path).layouts
    with pytest.raises(ConfigError, match="GB too much"):
        check(replace(published, tokens=longest + 16), Cluster(8), tmp_path)


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_cache_is_what_transformers_keeps(tensor_parallel):
    """Bytes per token of the KV cache equal transformers' own cache in bfloat16, and so do the
    weights of one GPU.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    }
    network = LlamaForCausalLM(LlamaConfig(**sizes)).to(torch.bfloat16)
    cache = network(torch.zeros(1, 10, dtype=torch.int64), use_cache=True).past_key_values
    kept = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    config = {"model_type": "llama", **sizes}
    small = Model("small", ModelSpec.from_hf(config))
    assert kv_bytes_per_token(small.spec, tensor_parallel) * 10 * tensor_parallel == kept
    assert engine_weight_bytes(small, 1) == sum(
        parameter.nbytes for parameter in network.parameters()
    )


def test_operations_are_what_torch_counts():
    """A forward pass's floating-point operations equal torch's own count over transformers' model.
    torch counts the whole square of the attention, as our formula does for twice the context.
    """
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    }
    network = Qwen2ForCausalLM(Qwen2Config(**sizes, attn_implementation="eager"))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 16, dtype=torch.int64))
    shape = ModelSpec.from_hf({"model_type": "qwen2", **sizes})
    assert 16 * forward_flops_per_token(shape, 2 * 16) == pytest.approx(
        counter.get_total_flops(), rel=0.01
    )


def test_recommended_overrides_pass_the_check(capsys):
    """The line to paste is a configuration, and the layout in it fits when it is checked alone; a
    machine-readable plan has the same numbers.
    """
    arguments = ["--stage", "stage3", "--nodes", "6", "+experiment=spark/base"]
    assert main(["plan", *arguments]) == 0
    text = capsys.readouterr().out
    (line,) = [line for line in text.splitlines() if line.startswith("recommended: ")]
    pasted = line.removeprefix("recommended: ").split()
    assert any(word.startswith("megatron.pipeline_parallel=") for word in pasted)
    assert (
        main(
            [
                "plan",
                "--check",
                "--json",
                *arguments,
                "engine.kind=sglang",
                "engine.policy.servers=1",
                "engine.verifier.servers=1",
                *pasted,
            ]
        )
        == 0
    )
    checked = json.loads(capsys.readouterr().out)
    assert len(checked["layouts"]) == 1 and checked["overrides"] == pasted
    bytes_ = checked["layouts"][0]["bytes"]
    assert (
        bytes_["peak"]
        >= bytes_["weights"] + bytes_["gradients"] + bytes_["optimizer"] + bytes_["activations"]
    )
    assert sum(engine["gpus"] for engine in checked["engines"]) + checked["trainer_gpus"] == 48
    compose_config(["+experiment=spark/base", "+engine=sglang", *pasted])


@pytest.mark.slow
def test_a_mixture_is_planned_with_its_weight_sync(capsys, tmp_path):
    """Qwen3-30B-A3B as the policy of stage III: an engine of one GPU holds the published bytes, a
    sync holds a bucket and the gathered vocabulary and moves the whole model, and the layouts
    spread its experts.
    """
    (tmp_path / "config.json").write_text((SHAPES / "qwen3-30b-a3b.json").read_text())
    assert engine_weight_bytes(model("qwen3-30b-a3b"), 1) == 61064245248
    assert (
        main(
            [
                "plan",
                "--stage",
                "stage3",
                "--json",
                "--nodes",
                "3",
                "--model",
                str(tmp_path),
                "rl.reward.model=Qwen2.5-14B-Instruct",
            ]
        )
        == 0
    )
    made = json.loads(capsys.readouterr().out)
    assert any(word.startswith("megatron.expert_parallel=") for word in made["overrides"])
    assert made["step_seconds"]["weight sync"] == 2 * 61.064245248 / 2  # written and read at 2 GB/s
    assert all(
        500 << 20 < each["bytes"]["sync"] - 2 * 151936 * 2048 <= 512 << 20
        for each in made["layouts"]
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--stage", "stage2", "--model", "Qwen2.5-72B-Instruct", "--nodes", "1"],
            r"does not fit 8 GPUs .* GB too much; megatron\..* on twice the GPUs saves",
        ),
        (
            [
                "--stage",
                "stage3",
                "--model",
                "Qwen2.5-72B-Instruct",
                "--nodes",
                "1",
                "--policy-gpus",
                "8",
            ],
            "none is left",
        ),
        (
            [
                "--stage",
                "stage3",
                "--model",
                "Qwen2.5-72B-Instruct",
                "--nodes",
                "1",
                "--gpus-per-node",
                "1",
            ],
            "does not fit an engine of 1 GPUs",
        ),
        (
            ["--stage", "sft", "--model", "nowhere/Unknown-1B", "--nodes", "1"],
            r"hf download NAME config.json .* the name is not one of Qwen2.5-14B-Instruct",
        ),
        (["--stage", "sft", "--nodes", "1"], "models.policy_base is not set: pass --model"),
        (
            ["--stage", "sft", "--model", "Qwen3-32B", "--nodes", "0"],
            "--nodes=0: must be at least 1",
        ),
        (
            ["--stage", "sft", "--model", "Qwen3-32B", "--nodes", "1", "--policy-gpus", "2"],
            "no effect with --stage sft",
        ),
        (
            ["--stage", "stage1", "--model", "Qwen3-32B", "--nodes", "1", "--check"],
            "--check has no effect",
        ),
        (
            ["--stage", "sft", "--model", "Qwen3-32B", "--nodes", "1", "--disk-gbs", "0"],
            "--disk-gbs 0.0: must be positive",
        ),
        (
            ["--stage", "sft", "--model", "Qwen3-32B", "--nodes", "1", "--gpu-memory-gb", "nan"],
            "--gpu-memory-gb nan: must",
        ),
        (
            ["--stage", "sft", "--model", "Qwen3-32B", "--nodes", "1", "--disk-gbs", "inf"],
            "--disk-gbs inf: must",
        ),
    ],
)
def test_errors_name_the_shortage_and_the_fix(capsys, words, message):
    """One line on stderr and status 2: by how much, and what helps."""
    assert main(["plan", *words]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and re.search(message, captured.err), captured.err
    assert captured.out == ""


def test_stages_check_the_machine_before_they_start(monkeypatch, tmp_path):
    """On a machine without CUDA a rank's budget is its share of the host's memory.

    The toy task passes, a 14B model does not. Ranks that torchrun or Slurm puts on other machines
    take no share.
    """
    assert not torch.cuda.is_available()
    memory_check.check_memory(resolve_toy(compose_config(["+experiment=toy"])), "stage2", "stage3")
    (tmp_path / "config.json").write_text((SHAPES / "qwen2.5-14b.json").read_text())
    config = compose_config([f"models.reward_base={tmp_path}", "megatron.data_parallel=4"])
    monkeypatch.setattr(
        memory_check.psutil, "virtual_memory", lambda: SimpleNamespace(total=256_000_000_000)
    )
    refusal = r"in stage2 needs .* 256.0 GB for 4 rank\(s\), 64.0 GB each: .* too much; megatron"
    with pytest.raises(ConfigError, match=refusal):
        memory_check.check_memory(config, "stage2")
    assert memory_check.local_ranks(4) == 4
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "2(x2)")
    assert memory_check.local_ranks(4) == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert memory_check.local_ranks(4) == 1
