"""``--dry-run``: describe what a command would do, from its settings; start and write nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spark_nemo.config import ConfigError, PoolConfig, SparkConfig
from spark_nemo.config.designs import reads_answer_keys
from spark_nemo.config.engine import POOLS
from spark_nemo.models.hf_config import read_hf_config
from spark_nemo.models.spec import ModelSpec
from spark_nemo.planning.known_models import PUBLISHED
from spark_nemo.planning.preflight import check_data_here, check_sync
from spark_nemo.records.problems import read_problems
from spark_nemo.run.rl_variants import RLVariant, pipeline_rl_variants, rl_variant_config
from spark_nemo.run.run_folder import stage2_folder
from spark_nemo.run.stage_spec import STAGES, StageSpec, required_setting, setting

PROMPT_TOKENS = 1024
"""Tokens reserved for a problem: the longest prompt of the paper's policy SFT."""
_COMPACT_PROMPT_TOKENS = 16
"""The same for the small models that use the compact prompts."""
_GPUS_PER_NODE = 8
_BASE_MODELS = {"models.policy": "models.policy_base", "rl.reward.model": "models.reward_base"}
"""Setting of a model that a stage makes to the setting of the model that it is trained from."""


@dataclass(frozen=True, slots=True)
class StageRuns:
    """Stage runs that a command makes; ``stage2`` has label methods with kinds of reward model."""

    sft: bool = False
    stage1: bool = False
    stage2: tuple[tuple[str, str], ...] = ()
    stage3: tuple[RLVariant, ...] = ()

    @classmethod
    def of(cls, config: SparkConfig, command: str) -> StageRuns:
        """Return the stage runs of a command."""
        own = config.stage2.method
        match command:
            case "sft":
                return cls(sft=True)
            case "stage1":
                return cls(stage1=True)
            case "stage2":
                return cls(stage2=((own, config.stage2.variant),))
            case "stage3":
                return cls(stage3=(RLVariant(config.rl.design, config.reward_variant),))
        models = tuple(
            (method, variant)
            for method in config.pipeline.label_methods
            for variant in (config.reward_models if method == own else [config.stage2.variant])
        )
        return cls(stage1=True, stage2=models, stage3=tuple(pipeline_rl_variants(config)))

    @property
    def specs(self) -> list[StageSpec]:
        """Stages that run."""
        runs = {
            "sft": self.sft,
            "stage1": self.stage1,
            "stage2": self.stage2,
            "stage3": self.stage3,
        }
        return [STAGES[name] for name, run in runs.items() if run]

    @property
    def fields(self) -> list[str]:
        """Models and data that must be set."""
        return [name for spec in self.specs for name in (*spec.models, *spec.data)]

    @property
    def trained(self) -> list[str]:
        """Models that the trainer ranks hold."""
        return [spec.trained_model for spec in self.specs if spec.trained_model is not None]


def dry_run(config: SparkConfig, command: str = "pipeline") -> str:
    """Check settings and data files, and describe what ``command`` would do, one fact per line.

    Data files that are not on this machine are not checked. Token counts are upper bounds: every
    generation at its limit. Raises ``ConfigError`` for a layout that does not fit a trained model
    or a context too short for a prompt, and ``DataFileError`` for a row that cannot be read.
    """
    check_without_files(config, command)
    runs = StageRuns.of(config, command)
    check_data_here(config, _read_fields(runs, command))
    lines = [
        f"run.dir      {config.run.dir}, seed {config.run.seed}",
        *_models(config, runs),
        *_ranks(config, runs),
    ]
    if runs.sft:
        lines += _format_sft(config)
    if runs.stage1:
        lines += _verification_data(config)
    if runs.stage2:
        lines += _reward_models(config, runs)
    for variant in runs.stage3:
        lines += _training(config, variant)
    return "\n".join([*lines, *_files(config, runs, command), *_engine(config, runs)])


def check_without_files(config: SparkConfig, command: str = "pipeline") -> None:
    """Check settings, layouts, contexts and what stages need from each other; read no data files.

    Raises ``ConfigError``.
    """
    runs = StageRuns.of(config, command)
    for field in runs.fields:
        required_setting(config, field)
    for field in runs.trained:
        shape = _hf_config(config, field)
        if shape is not None:
            ModelSpec.from_hf(shape, field).check_layout(config.megatron)
            if field == "models.policy":
                check_sync(shape, field)
    if "paper" in (config.stage1.prompt_set, config.rl.prompt_set):
        prompt_tokens = PROMPT_TOKENS
    else:
        prompt_tokens = _COMPACT_PROMPT_TOKENS
    for field, model, tokens, limit in _texts(config, runs):
        needed = tokens + prompt_tokens
        if needed > limit:
            fix = "lower max_new_tokens"
            if limit >= config.engine.max_context:
                fix += " or raise engine.max_context"
            raise ConfigError(
                f"{field}: {needed} tokens with {prompt_tokens} for the problem, but "
                f"{model}={setting(config, model)} has a context of {limit} here: {fix}"
            )
    if runs.sft:
        _check_sft_length(config)
    if command == "pipeline":
        for variant in runs.stage3:
            rl_variant_config(config, variant)
            if (
                variant.comes_from_stage2(config)
                and config.stage2.method not in config.pipeline.label_methods
            ):
                raise ConfigError(
                    f"stage2.method={config.stage2.method} rewards stage III: add it to "
                    "pipeline.label_methods"
                )
    elif (
        command == "stage3"
        and reads_answer_keys(config.rl.design)
        and config.data.rl_answers is None
    ):
        raise ConfigError(
            f"rl/reward={config.rl.design} needs data.rl_answers (JSONL with problem_id and answer)"
        )


def _check_sft_length(config: SparkConfig) -> None:
    shape = _hf_config(config, "models.policy_base")
    if shape is not None and config.sft.max_length > _context(shape):
        raise ConfigError(
            f"sft.max_length={config.sft.max_length}: "
            f"models.policy_base={config.models.policy_base} has a context of {_context(shape)}"
        )


def _texts(config: SparkConfig, runs: StageRuns) -> Iterator[tuple[str, str, int, int]]:
    """Yield ``(setting, model, tokens, context)`` for each kind of text.

    ``tokens`` is the length of the longest text without the problem.
    """
    written = config.stage1.generator_sampling.max_new_tokens
    verified = written + config.stage1.verifier_sampling.max_new_tokens
    response = config.rl.sampling.max_new_tokens
    rows = []
    if runs.stage1:
        rows += [
            ("stage1.generator_sampling", "models.generator", written),
            ("stage1.verifier_sampling", "models.verifier", verified),
        ]
    if runs.stage1 and config.stage1.meta_critique:
        # A merge reads solution, verification and critique.
        rows.append(
            (
                "stage1.revision_sampling",
                "models.critic" if config.models.critic else "models.verifier",
                verified + 2 * config.stage1.revised_with.max_new_tokens,
            )
        )
    if runs.stage3:
        rows += [
            ("rl.sampling", "models.policy", response),
            ("evaluation", "models.policy", config.evaluation.max_new_tokens),
        ]
    if any(variant.variant for variant in runs.stage3):
        rows.append(
            (
                "rl.reward.sampling",
                "rl.reward.model" if config.rl.named_reward_model else "models.reward_base",
                response + config.rl.reward.sampling.max_new_tokens,
            )
        )
    for field, model, tokens in rows:
        shape = _hf_config(config, model)
        # A model of unknown size, such as the toy task's, is checked when it is loaded.
        if shape is not None:
            yield field, model, tokens, min(_context(shape), config.engine.max_context)


def _models(config: SparkConfig, runs: StageRuns) -> list[str]:
    used = [field for field in runs.fields if field.startswith("models.")]
    if runs.stage1 and config.models.critic is not None:
        used.append("models.critic")
    if config.rl.named_reward_model is not None and any(variant.variant for variant in runs.stage3):
        used.append("rl.reward.model")
    lines = []
    for field in used:
        value = setting(config, field)
        shape = _hf_config(config, field)
        if shape:
            size = (
                f"{shape['model_type']}, {shape['num_hidden_layers']} layers, "
                f"context {_context(shape):,}"
            )
        else:
            size = "size unknown before it is loaded"
        here = value.startswith("toy:") or (Path(value) / "config.json").exists()
        missing = "" if here else "; not on this machine"
        made_by_sft = config.models.policy_base and Path(value).parts[-2:] == ("sft", "model")
        if not here and field == "models.policy" and made_by_sft:
            missing = f"; `spark-nemo sft` makes it of {config.models.policy_base}"
        lines.append(f"model        {field.removeprefix('models.')}: {value} ({size}{missing})")
    shape = _hf_config(config, "models.policy") if runs.stage3 else None
    if shape:
        response = config.rl.sampling.max_new_tokens
        prompt = min(config.engine.max_context, _context(shape)) - response
        lines.append(
            f"context      policy: {prompt:,} prompt + {response:,} response tokens; "
            "no setting drops longer prompts, data.rl_problems must not have any"
        )
    return lines


def _ranks(config: SparkConfig, runs: StageRuns) -> list[str]:
    if not runs.trained:
        return ["ranks        none: this stage only generates"]
    layout = config.megatron
    nodes = -(-layout.world_size // _GPUS_PER_NODE)
    every = "; every stage the same" if len(runs.trained) > 1 else ""
    return [
        f"ranks        {layout.world_size} trainer ranks = TP {layout.tensor_parallel} x "
        f"PP {layout.pipeline_parallel} x DP {layout.data_parallel}, "
        f"{nodes} node(s) of {_GPUS_PER_NODE} GPUs{every}"
    ]


def _format_sft(config: SparkConfig) -> list[str]:
    sft = config.sft
    examples, basis = _count(config.data.sft_examples, "example")
    tokens = round(examples * (1 - sft.val_fraction)) * sft.epochs * sft.max_length
    return [
        f"format SFT   {basis}, {sft.val_fraction:.0%} of the problems held out, "
        f"{sft.epochs} epochs of batches of {sft.batch_size}, at most {tokens:,} trained tokens"
    ]


def _verification_data(config: SparkConfig) -> list[str]:
    stage = config.stage1
    solutions = stage.solutions_per_problem
    votes = solutions * stage.verifications_per_solution
    problems, basis = _count(config.data.stage1_problems)
    tokens = (
        solutions * stage.generator_sampling.max_new_tokens
        + votes * stage.verifier_sampling.max_new_tokens
    )
    lines = [
        f"stage I      {basis}: {problems * solutions:,} solutions, "
        f"{problems * votes:,} verifications, at most {problems * tokens:,} generated tokens"
    ]
    if stage.meta_critique:
        critiques = problems * solutions * len(stage.meta_critique)
        generated = 2 * critiques * stage.revised_with.max_new_tokens
        lines.append(
            f"stage I      critiques chosen by {', '.join(stage.meta_critique)}: {basis}, "
            f"at most {critiques:,} and as many merges, {generated:,} generated tokens"
        )
    if stage.reference_answers is not None:
        guided = problems * solutions * stage.num_reference_verifications
        lines.append(
            f"stage I      reference_guided, READS ANSWER KEYS: {basis}, {guided:,} verifications "
            f"of at most {guided * stage.verifier_sampling.max_new_tokens:,} tokens"
        )
    return lines


def _reward_models(config: SparkConfig, runs: StageRuns) -> list[str]:
    stage = config.stage2
    problems, basis = _count(config.data.stage1_problems)
    examples = problems * config.stage1.solutions_per_problem
    trained = examples * stage.epochs * stage.max_length
    lines = [f"labels       {_selection(config)}"]
    for method, variant in runs.stage2:
        lines.append(
            f"stage II     {method}, {variant}: {basis}, at most {examples:,} examples x "
            f"{stage.epochs} epochs, {trained:,} trained tokens"
        )
    return lines


def _training(config: SparkConfig, variant: RLVariant) -> list[str]:
    rl = config.rl
    rollouts = rl.steps * rl.prompts_per_step * rl.group_size
    verified = "no verifications"
    if variant.variant:
        verifications = rollouts * rl.reward.votes
        tokens = verifications * rl.reward.sampling.max_new_tokens
        # Retries are rare, but an upper bound includes them.
        retries = rl.reward.retries
        verified = (
            f"{verifications:,} verifications of at most {tokens:,} tokens, "
            f"{tokens * (1 + retries):,} if all were retried {retries} times"
        )
    note = ", READS ANSWER KEYS" if variant.reads_answer_keys else ""
    problems, basis = _count(config.data.eval_problems)
    evaluations = -(-rl.steps // rl.eval_every) + 1
    # One more per problem: the greedy completion.
    completions = evaluations * problems * (config.evaluation.samples_per_problem + 1)
    return [
        f"stage III    {variant.name}{note}: {rl.steps} steps, {rollouts:,} rollouts of at most "
        f"{rollouts * rl.sampling.max_new_tokens:,} tokens, {verified}",
        f"evaluation   {variant.name}: {basis}, {evaluations} times, {completions:,} "
        f"completions of at most {completions * config.evaluation.max_new_tokens:,} tokens",
    ]


def _selection(config: SparkConfig) -> str:
    labels = config.labels
    if labels.balance == "none":
        if labels.max_per_problem is None:
            return "not balanced, no limit per problem"
        return f"not balanced, at most {labels.max_per_problem} per problem"
    if labels.balance == "ground_truth":
        by = "answer keys, READS ANSWER KEYS"
    else:
        by = "the labels' own verdicts"
    limit = labels.max_per_verdict or 3
    return f"balanced by {by}, at most {limit} + {limit} per problem"


def _read_fields(runs: StageRuns, command: str) -> list[str]:
    """Return the settings that name data files; files with answer keys may be unset."""
    read = [name for spec in runs.specs for name in spec.data]
    for spec in runs.specs:
        read += [name for name in spec.answer_keys if name != "data.rl_answers"]
    if any(variant.reads_answer_keys for variant in runs.stage3):
        read.append("pipeline.rl_answers" if command == "pipeline" else "data.rl_answers")
    return read


def _files(config: SparkConfig, runs: StageRuns, command: str) -> list[str]:
    lines = []
    for field in _read_fields(runs, command):
        value = setting(config, field)
        if not value:
            continue
        if value.startswith("toy:"):
            state = "made on the run"
        elif Path(value).exists():
            state = "here"
        else:
            state = "missing"
        lines.append(f"reads        {field}: {value} ({state})")
    written = []
    if command == "pipeline":
        written.append("config.yaml")
    if runs.sft:
        written.append("sft/model")
    if runs.stage1:
        written.append("stage1/store")
    written += [f"stage2/{stage2_folder(config.run, *model).name}/model" for model in runs.stage2]
    written += [f"stage3/{variant.name}/model" for variant in runs.stage3]
    if command == "pipeline":
        written += ["summary.json", "report.html"]
    return [*lines, *(f"writes       {config.run.dir}/{name}" for name in written)]


def _engine(config: SparkConfig, runs: StageRuns) -> list[str]:
    engine = config.engine
    if runs == StageRuns(sft=True):
        return []
    if engine.kind != "local":
        return [
            f"engine       {engine.kind}, {role} pool: " + _servers(engine.pool(role))
            for role in POOLS
        ]
    if all(value is None or value.startswith("toy:") for value in vars(config.models).values()):
        return []
    return [
        f"engine       engine.kind={engine.kind} is the embedded engine, for small Qwen2 models: "
        "add +engine=sglang (servers on this machine), or name servers in engine.policy.urls "
        "and engine.verifier.urls"
    ]


def _servers(pool: PoolConfig) -> str:
    if pool.urls:
        return f"{len(pool.urls)} given: {', '.join(pool.urls)}"
    if pool.servers is None:
        return "none configured: a stage that needs it will fail"
    router = ", behind sglang-router" if pool.router else ""
    return f"{pool.servers} to launch here, tensor parallel {pool.tensor_parallel or 1}{router}"


def _count(value: str, unit: str = "problem") -> tuple[int, str]:
    """Return the number of rows and a phrase for it; 1 if the file is not on this machine."""
    if value.startswith("toy:"):
        count = int(value.rpartition(":")[2])
        return count, f"{count:,} {unit}s"
    if not Path(value).is_file():
        return 1, f"per {unit} (the file is not here)"
    if Path(value).suffix == ".parquet":
        count = len(read_problems(value))
    elif Path(value).suffix == ".json":  # one list, which held-out problems may be
        count = len(json.loads(Path(value).read_text()))
    else:
        with open(value, "rb") as file:
            count = sum(1 for line in file if line.strip())
    return count, f"{count:,} {unit}s"


def _hf_config(config: SparkConfig, field: str) -> dict[str, Any] | None:
    """Return the config.json of a model, or None if its size is unknown.

    A folder that does not exist yet has the published sizes for its name, or its base model's.
    """
    folder = Path(setting(config, field))
    if (folder / "config.json").exists():
        return read_hf_config(folder)
    base = _BASE_MODELS.get(field)
    # The format SFT and stage II write their models to folders called ``model``.
    if folder.name == "model" and base is not None and setting(config, base):
        return _hf_config(config, base)
    return PUBLISHED.get(folder.name)


def _context(shape: dict[str, Any]) -> int:
    return shape.get("max_position_embeddings", 32768)
