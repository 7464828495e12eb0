"""``spark-nemo slurm-manifest --stage STAGE``: what the scripts in ``slurm/`` need to know of a
configuration.

One ``NAME=value`` per line. Composing and checking happen here, on one node and without a GPU, so
that a wrong override or a missing file ends a job in its first seconds.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from spark_nemo.cli.arguments import add_command, add_config_arguments, configured
from spark_nemo.cli.evaluate import add_job_arguments, check_job_arguments, model_output
from spark_nemo.config import ConfigError, SparkConfig
from spark_nemo.run.compose import compose_config
from spark_nemo.run.run_folder import DONE, reward_model_path
from spark_nemo.run.stage_spec import PIPELINE_STAGES, STAGES, setting

JOBS = (*STAGES, "pipeline", "nodes", "report", "evaluate-math", "evaluate-processbench")


def add_slurm_manifest_command(commands: argparse._SubParsersAction) -> None:
    """Add ``slurm-manifest``."""
    command = add_command(
        commands,
        "slurm-manifest",
        "check the settings and print what the scripts in slurm/ need to know, as NAME=value lines",
        _slurm_manifest,
    )
    add_config_arguments(command)
    command.add_argument("--stage", choices=JOBS, required=True)
    add_job_arguments(command)


def _slurm_manifest(arguments: argparse.Namespace) -> int:
    from spark_nemo.planning.dry_run import check_without_files

    config = configured(arguments)
    if config is None:
        return 0
    if arguments.stage == "pipeline":
        check_without_files(compose_config(arguments.overrides))
    print(slurm_manifest(config, arguments))
    return 0


def slurm_manifest(config: SparkConfig, arguments: argparse.Namespace) -> str:
    """The plan of one job, or of the whole chain for ``pipeline``. Raises ``ConfigError`` for what
    cannot run.
    """
    stage = arguments.stage
    check_job_arguments(
        stage.removeprefix("evaluate-") if stage.startswith("evaluate-") else None, arguments
    )
    lines = {"RUN_DIR": str(Path(config.run.dir).resolve()), "ENGINE": config.engine.kind}
    if stage != "nodes":
        lines |= _chain(config) if stage == "pipeline" else _part(stage, config, arguments)
    servers = _servers(config) if stage == "stage3" else ()
    jobs = _jobs(config) if stage == "pipeline" else ()
    needs = [("NEEDS", str(path.resolve())) for path in _needed_files(stage, config, arguments)]
    plan = [*lines.items(), *servers, *jobs, *needs]
    for name, value in plan:
        if "\n" in value:
            raise ConfigError(
                f"{name}={value!r}: a path with a line break cannot be used on a cluster"
            )
    return "\n".join(f"{name}={value}" for name, value in plan)


def _chain(config: SparkConfig) -> dict[str, str]:
    from spark_nemo.planning.preflight import check_pipeline
    from spark_nemo.stages.pipeline import claim_run_folder

    if config.pipeline.rounds > 1:
        raise ConfigError(
            f"pipeline.rounds={config.pipeline.rounds}: slurm/pipeline.sh submits one round; "
            "later ones run with spark-nemo pipeline, or stage by stage"
        )
    check_pipeline(config)
    claim_run_folder(config)
    return {"WORLD_SIZE": str(config.megatron.world_size)}


def _jobs(config: SparkConfig) -> Iterator[tuple[str, str]]:
    """Yield the reward models and RL variants of the pipeline, one tab-separated line each.

    A line has the folder's name and the overrides of the job; an RL variant has its reward model's
    name in between, or ``-`` if the pipeline does not train that model.
    """
    from spark_nemo.run.job_graph import build_job_graph

    for job in build_job_graph(config, []):
        stage, *own = job.arguments
        # Hydra's own reference: the file's name needs no quoting.
        own = [
            "data.rl_answers=${pipeline.rl_answers}"
            if word.startswith("data.rl_answers=") and "null" not in word
            else word
            for word in own
        ]
        if stage == "stage2":
            yield "REWARD_MODEL", "\t".join([job.folder.name, *own])
        if stage == "stage3":
            needs = next((name.removeprefix("stage2-") for name in job.after), "-")
            yield "RL_VARIANT", "\t".join([job.folder.name, needs, *own])


def _part(stage: str, config: SparkConfig, arguments: argparse.Namespace) -> dict[str, str]:
    if stage == "report":
        return {
            "STAGE_RUN": "report",
            "DONE_FILE": str(Path(config.run.dir).resolve() / "report.html"),
        }
    if stage not in STAGES:
        result = model_output(stage.removeprefix("evaluate-"), config, arguments)
        return {"STAGE_RUN": f"evaluate/{result.stem}", "DONE_FILE": str(result.resolve())}
    _check_stage(stage, config)
    folder = STAGES[stage].folder(config)
    ranks = config.megatron.world_size if STAGES[stage].trained_model is not None else 1
    # Only stage III's number of steps is known before the job runs; 0 means unknown.
    total = config.rl.steps if stage == "stage3" else 0
    return {
        "STAGE_RUN": str(folder.relative_to(config.run.dir)),
        "STAGE_RUN_DIR": str(folder.resolve()),
        "DONE_FILE": str((folder / DONE).resolve()),
        "WORLD_SIZE": str(ranks),
        "TOTAL": str(total),
    }


def _check_stage(stage: str, config: SparkConfig) -> None:
    from spark_nemo.planning.preflight import check_stage1, check_stage2, check_stage3
    from spark_nemo.stages.sft import sft_data

    checks = {
        "sft": sft_data,
        "stage1": check_stage1,
        "stage2": check_stage2,
        "stage3": check_stage3,
    }
    checks[stage](config)


def _servers(config: SparkConfig) -> Iterator[tuple[str, str]]:
    """Yield the launch settings of each role's servers on a node of their own, from its pool."""
    from spark_nemo.engines.sglang.launch import CONTEXT_RESERVE
    from spark_nemo.models.hf_config import read_hf_config
    from spark_nemo.planning.preflight import reward_model_folder

    if config.engine.kind == "local":
        return
    models = {"policy": Path(config.models.policy)}
    if config.rl.asks_reward_model:
        models["verifier"] = reward_model_folder(config)
    for role, folder in models.items():
        pool, name = config.engine.pool(role), role.upper()
        if pool.servers is None:
            continue
        positions = read_hf_config(folder).get("max_position_embeddings", 32768)
        yield f"{name}_SERVERS", str(pool.servers)
        yield f"{name}_GPUS", str(pool.tensor_parallel or 1)
        yield f"{name}_PYTHON", pool.python or ""
        fixed = [
            "--model-path",
            str(folder.resolve()),
            "--tp-size",
            str(pool.tensor_parallel or 1),
            "--weight-version",
            "0",
            "--max-running-requests",
            str(config.engine.max_batch_size),
            "--context-length",
            str(min(positions, config.engine.max_context + CONTEXT_RESERVE)),
        ]
        for word in [*fixed, *pool.server_args]:
            yield f"{name}_WORD", word
        for variable, value in pool.server_env.items():
            yield f"{name}_ENV", f"{variable}={value}"


def _needed_files(stage: str, config: SparkConfig, arguments: argparse.Namespace) -> Iterator[Path]:
    """Yield the models and data files that the nodes of this job read."""
    if arguments.data is None:
        for name in _file_settings(stage):
            if value := setting(config, name):
                yield Path(value)
    else:
        yield from (Path(source) for source in arguments.data if not source.startswith("hf:"))
    if arguments.model is not None:
        yield Path(arguments.model)
    if stage == "stage3" and config.rl.asks_reward_model:
        yield reward_model_path(config)


def _file_settings(stage: str) -> Iterator[str]:
    if stage == "evaluate-math":
        yield "data.eval_problems"
    elif stage == "evaluate-processbench":
        yield "data.processbench"
    elif stage == "pipeline":
        for name in PIPELINE_STAGES:
            yield from _file_settings(name)
        yield "pipeline.rl_answers"
    elif stage in STAGES:
        spec = STAGES[stage]
        yield from (*spec.models, *spec.optional_models, *spec.data, *spec.answer_keys)
