"""Replace ``toy:...`` names in a configuration by folders and files, before any stage reads it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from spark_nemo.config import ConfigError, SparkConfig
from spark_nemo.report.collect_summary import Oracle
from spark_nemo.toy import oracle, problem_files

ASSETS = Path(__file__).resolve().parent / "assets"
_PREFIX = "toy:"
_WITH_ANSWERS = ("eval_problems", "rl_answers", "reference_answers")


def resolve_toy(config: SparkConfig) -> SparkConfig:
    """Resolve ``toy:generator``, ``toy:rl:2000`` and the like; write files to ``run.dir/data``.

    Raises ``ConfigError`` that names the field for a toy name that does not exist.
    """

    def file(field: str) -> str | None:
        section, name = field.split(".")
        return _file(field, name, getattr(getattr(config, section), name), config)

    models = {name: _model(f"models.{name}", value) for name, value in vars(config.models).items()}
    data = {name: file(f"data.{name}") for name in vars(config.data)}
    return replace(
        config,
        models=replace(config.models, **models),
        data=replace(config.data, **data),
        stage1=replace(config.stage1, reference_answers=file("stage1.reference_answers")),
        labels=replace(config.labels, reference_answers=file("labels.reference_answers")),
        pipeline=replace(config.pipeline, rl_answers=file("pipeline.rl_answers")),
    )


def oracle_for(config: SparkConfig) -> Oracle | None:
    """Return the true step labels of the toy task for reports, or None for any other task."""
    is_toy = Path(config.models.generator).parent == ASSETS
    return oracle.step_truths if is_toy else None


def _model(field: str, value: str | None) -> str | None:
    if value is None or not value.startswith(_PREFIX):
        return value
    folder = ASSETS / value.removeprefix(_PREFIX)
    if not (folder / "config.json").exists():
        known = ", ".join(sorted(f"toy:{path.name}" for path in ASSETS.glob("*/") if path.is_dir()))
        raise ConfigError(f"{field}={value}: no such model of the toy task; known are {known}")
    return str(folder)


def _file(field: str, name: str, value: str | None, config: SparkConfig) -> str | None:
    if value is None or not value.startswith(_PREFIX):
        return value
    split, _, count = value.removeprefix(_PREFIX).partition(":")
    if split not in problem_files.SPLITS or not count.isdigit():
        raise ConfigError(
            f"{field}={value}: write toy:SPLIT:COUNT with SPLIT one of "
            f"{', '.join(problem_files.SPLITS)}"
        )
    folder = Path(config.run.dir) / "data"
    seed = config.run.seed
    if name == "processbench":
        return str(problem_files.write_processbench(int(count), folder))
    if name == "sft_examples":
        return str(problem_files.write_policy_examples(int(count), seed, folder))
    write = problem_files.write_answers if name in _WITH_ANSWERS else problem_files.write_problems
    return str(write(split, int(count), seed, folder))
