"""``spark-nemo plan``: layouts that fit a cluster, memory per rank, and estimated step times."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields
from typing import TypeVar

from spark_nemo.config import ConfigError
from spark_nemo.run.compose import compose_config, config_yaml

Flags = TypeVar("Flags")
STAGES = ("stage1", "stage2", "stage3", "sft")
EXAMPLES = """examples:
  spark-nemo plan --stage stage3 --nodes 6 +experiment=spark/base
  spark-nemo plan --stage stage3 --nodes 24 --policy-gpus 32 --verifier-gpus 32 --check \\
      +experiment=spark/base_70b
  spark-nemo plan --stage stage2 --model Qwen2.5-72B-Instruct --nodes 16 --json
  spark-nemo plan --stage sft --model Qwen2.5-Math-7B --nodes 1 --gpu-memory-gb 141 \\
      megatron.recompute_granularity=full

It reads config.json files and starts nothing. Memory is counted (docs/planning.md says how well),
times are arithmetic on the rates printed below them: set them to what your cluster achieves. Exit
status 2 when nothing fits; the message says what is missing and which setting helps."""


def add_plan_command(commands: argparse._SubParsersAction) -> None:
    """Add the ``plan`` command."""
    parser = commands.add_parser(
        "plan",
        help="memory per rank, layouts that fit, and estimated step times on a cluster",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    configure(parser)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``plan``."""
    from spark_nemo.planning.cluster import Cluster, Rates

    parser.add_argument(
        "overrides", nargs="*", help="Hydra overrides: +experiment=NAME, section.key=value"
    )
    parser.add_argument(
        "--print-config", action="store_true", help="show the resolved configuration and exit"
    )
    parser.add_argument("--stage", choices=STAGES, required=True)
    parser.add_argument(
        "--model",
        help="folder or published name, instead of the configured model that the stage "
        "trains (stage1: that generates)",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="only the configured layout (megatron.*); without it, all",
    )
    parser.add_argument("--json", action="store_true", help="everything as one JSON object")
    for role in ("policy", "verifier"):
        parser.add_argument(
            f"--{role}-gpus",
            type=int,
            metavar="N",
            help=f"GPUs of the {role} servers in stage1 and stage3; default: a sixth of the nodes",
        )
    cluster = parser.add_argument_group("cluster")
    cluster.add_argument("--nodes", type=int, required=True)
    _flags(
        cluster,
        Cluster,
        {
            "gpus_per_node": "",
            "gpu_memory_gb": "10^9 bytes of one GPU as CUDA reports them: "
            "79.1 GiB on an H100 of 80 GB",
            "reserve": "share of it for CUDA, NCCL and fragmentation",
        },
    )
    rates = parser.add_argument_group(
        "rates", "Achieved rates. The defaults are assumptions for H100 in bfloat16."
    )
    _flags(
        rates,
        Rates,
        {
            "train_tflops": "per GPU, training",
            "prefill_tflops": "per GPU, reading prompts",
            "memory_gbs": "GB/s of a GPU's memory",
            "nvlink_gbs": "GB/s between GPUs of a node",
            "network_gbs": "GB/s per GPU between nodes",
            "collective_us": "microseconds of a small collective in a node",
            "disk_gbs": "GB/s of the shared file system",
            "mean_length": "mean length of texts as a share of their limit",
            "kv_share": "share of a GPU that an engine takes for weights and KV cache",
        },
    )
    parser.set_defaults(run=_plan, parser=parser)


def _flags(group: argparse._ArgumentGroup, kind: type, texts: dict[str, str]) -> None:
    defaults = {field.name: field.default for field in fields(kind)}
    for name, text in texts.items():
        group.add_argument(
            f"--{name.replace('_', '-')}",
            type=type(defaults[name]),
            default=defaults[name],
            help=f"{text} (default {defaults[name]:g})".strip(),
        )


def _plan(arguments: argparse.Namespace) -> int:
    from spark_nemo.planning.capacity_planner import plan_capacity
    from spark_nemo.planning.capacity_table import plan_json, plan_text
    from spark_nemo.planning.cluster import Cluster, Rates

    config = compose_config(arguments.overrides)
    if arguments.print_config:
        print(config_yaml(config), end="")
        return 0
    engine_gpus = {"policy": arguments.policy_gpus, "verifier": arguments.verifier_gpus}
    engine_gpus = {role: gpus for role, gpus in engine_gpus.items() if gpus is not None}
    if engine_gpus and arguments.stage not in ("stage1", "stage3"):
        raise ConfigError(
            f"--{min(engine_gpus)}-gpus has no effect with --stage {arguments.stage}: "
            "no engine runs"
        )
    if arguments.check and arguments.stage == "stage1":
        raise ConfigError("--check has no effect with --stage stage1: nothing is trained")
    plan = plan_capacity(
        config,
        arguments.stage,
        _from_flags(Cluster, arguments),
        _from_flags(Rates, arguments),
        model=arguments.model,
        engine_gpus=engine_gpus,
        check=arguments.check,
    )
    if arguments.json:
        print(json.dumps(plan_json(plan), indent=1))
    else:
        print(plan_text(plan))
    return 0


def _from_flags(kind: type[Flags], arguments: argparse.Namespace) -> Flags:
    """Return the dataclass whose fields are flags of the command."""
    return kind(**{field.name: getattr(arguments, field.name) for field in fields(kind)})
