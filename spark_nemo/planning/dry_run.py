"""``--dry-run``: what a subcommand would do, from the configuration alone. Starts and writes
nothing.
"""

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

PROMPT_ROOM, COMPACT_ROOM = 1024, 16
"""Tokens that must be left for a problem: the longest prompt of the paper's policy SFT, and next to
nothing for the small models that the compact prompts are for.
"""
_GPUS_PER_NODE = 8


PARTS = ("sft", "stage1", "stage2", "stage3", "pipeline")


@dataclass(frozen=True, slots=True)
class Parts:
    """What a subcommand does: of stage II, label methods with kinds of reward model; of stage III,
    arms.
    """

    sft: bool = False
    stage1: bool = False
    stage2: tuple[tuple[str, str], ...] = ()
    stage3: tuple[RLVariant, ...] = ()

    @classmethod
    def of(cls, config: SparkConfig, part: str) -> Parts:
        """Of a subcommand's name."""
        own = config.stage2.method
        match part:
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
        """The table's rows of the stages that run."""
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


def dry_run(config: SparkConfig, part: str = "pipeline") -> str:
    """Validate settings, and the data files that are on this machine, and describe what subcommand
    ``part`` would do, one fact per line.

    Token counts are upper bounds: every generation at its limit. Raises ``ConfigError`` for a
    layout that does not fit a trained model, or a context that leaves no room for a prompt,
    ``DataFileError`` for a row that cannot be read.
    """
    check_without_files(config, part)
    parts = Parts.of(config, part)
    check_data_here(config, _read_fields(parts, part))
    lines = [
        f"run.dir      {config.run.dir}, seed {config.run.seed}",
        *_models(config, parts),
        *_ranks(config, parts),
    ]
    if parts.sft:
        lines += _format_sft(config)
    if parts.stage1:
        lines += _verification_data(config)
    if parts.stage2:
        lines += _reward_models(config, parts)
    for arm in parts.stage3:
        lines += _training(config, arm)
    return "\n".join([*lines, *_files(config, parts, part), *_engine(config, parts)])


def check_without_files(config: SparkConfig, part: str = "pipeline") -> None:
    """Names set, layouts, contexts, and what the pipeline's parts need of each other. Raises
    ``ConfigError``.
    """
    parts = Parts.of(config, part)
    for field in parts.fields:
        required_setting(config, field)
    for field in parts.trained:
        if (shape := _hf_config(config, field)) is not None:
            ModelSpec.from_hf(shape, field).check_layout(config.megatron)
            if field == "models.policy":
                check_sync(shape, field)
    room = (
        PROMPT_ROOM if "paper" in (config.stage1.prompt_set, config.rl.prompt_set) else COMPACT_ROOM
    )
    for field, model, tokens, limit in _texts(config, parts):
        if tokens + room > limit:
            raise ConfigError(
                f"{field}: {tokens + room} tokens with {room} for the problem, but "
                f"{model}={setting(config, model)} has "
                f"a context of {limit} here: lower max_new_tokens"
                + ("" if limit < config.engine.max_context else " or raise engine.max_context")
            )
    if parts.sft:
        _check_sft_length(config)
    if part == "pipeline":
        for arm in parts.stage3:
            rl_variant_config(config, arm)
            if (
                arm.comes_from_stage2(config)
                and config.stage2.method not in config.pipeline.label_methods
            ):
                raise ConfigError(
                    f"stage2.method={config.stage2.method} rewards stage III: add it to "
                    "pipeline.label_methods"
                )
    elif (
        part == "stage3" and reads_answer_keys(config.rl.design) and config.data.rl_answers is None
    ):
        raise ConfigError(
            f"rl/reward={config.rl.design} needs data.rl_answers (JSONL with problem_id and answer)"
        )


def _check_sft_length(config: SparkConfig) -> None:
    shape = _hf_config(config, "models.policy_base")
    if shape is not None and config.sft.max_length > (context := _context(shape)):
        raise ConfigError(
            f"sft.max_length={config.sft.max_length}: models.policy_base={config.models.policy_base} has "
            f"a context of {context}"
        )


def _texts(config: SparkConfig, parts: Parts) -> Iterator[tuple[str, str, int, int]]:
    """``(field, model field, tokens of its longest text without the problem, the context there
    is)`` of every kind.
    """
    written = config.stage1.generator_sampling.max_new_tokens
    verified = written + config.stage1.verifier_sampling.max_new_tokens
    response = config.rl.sampling.max_new_tokens
    rows = []
    if parts.stage1:
        rows += [
            ("stage1.generator_sampling", "models.generator", written),
            ("stage1.verifier_sampling", "models.verifier", verified),
        ]
    if parts.stage1 and config.stage1.meta_critique:
        # A merge reads solution, verification and critique.
        rows.append(
            (
                "stage1.revision_sampling",
                "models.critic" if config.models.critic else "models.verifier",
                verified + 2 * config.stage1.revised_with.max_new_tokens,
            )
        )
    if parts.stage3:
        rows += [
            ("rl.sampling", "models.policy", response),
            ("evaluation", "models.policy", config.evaluation.max_new_tokens),
        ]
    if any(arm.variant for arm in parts.stage3):
        rows.append(
            (
                "rl.reward.sampling",
                "rl.reward.model" if config.rl.named_reward_model else "models.reward_base",
                response + config.rl.reward.sampling.max_new_tokens,
            )
        )
    for field, model, tokens in rows:
        shape = _hf_config(config, model)
        # A model of unknown size, such as the small world's, is checked when it is loaded.
        if shape is not None:
            yield field, model, tokens, min(_context(shape), config.engine.max_context)


def _models(config: SparkConfig, parts: Parts) -> list[str]:
    used = [field for field in parts.fields if field.startswith("models.")]
    if parts.stage1 and config.models.critic is not None:
        used.append("models.critic")
    if config.rl.named_reward_model is not None and any(arm.variant for arm in parts.stage3):
        used.append("rl.reward.model")
    lines = []
    for field in used:
        value, shape = setting(config, field), _hf_config(config, field)
        size = (
            f"{shape['model_type']}, {shape['num_hidden_layers']} layers, context {_context(shape):,}"
            if shape
            else "size unknown before it is loaded"
        )
        here = value.startswith("toy:") or (Path(value) / "config.json").exists()
        missing = "" if here else "; not on this machine"
        if (
            not here
            and field == "models.policy"
            and config.models.policy_base
            and (Path(value).parts[-2:] == ("sft", "model"))
        ):
            missing = f"; `spark-nemo sft` makes it of {config.models.policy_base}"
        lines.append(f"model        {field.removeprefix('models.')}: {value} ({size}{missing})")
    if parts.stage3 and (shape := _hf_config(config, "models.policy")):
        room = min(config.engine.max_context, _context(shape)) - config.rl.sampling.max_new_tokens
        lines.append(
            f"context      policy: {room:,} prompt + {config.rl.sampling.max_new_tokens:,} response tokens; "
            f"no setting drops longer prompts, data.rl_problems must not have any"
        )
    return lines


def _ranks(config: SparkConfig, parts: Parts) -> list[str]:
    if not parts.trained:
        return ["ranks        none: this part only generates"]
    m, world = config.megatron, config.megatron.world_size
    every = "; every stage the same" if len(parts.trained) > 1 else ""
    return [
        f"ranks        {world} trainer ranks = TP {m.tensor_parallel} x PP {m.pipeline_parallel} x DP "
        f"{m.data_parallel}, {-(-world // _GPUS_PER_NODE)} node(s) of {_GPUS_PER_NODE} GPUs{every}"
    ]


def _format_sft(config: SparkConfig) -> list[str]:
    sft = config.sft
    examples, basis = _count(config.data.sft_examples, "example")
    tokens = round(examples * (1 - sft.val_fraction)) * sft.epochs * sft.max_length
    return [
        f"format SFT   {basis}, {sft.val_fraction:.0%} of the problems held out, {sft.epochs} epochs of batches of "
        f"{sft.batch_size}, at most {tokens:,} trained tokens"
    ]


def _verification_data(config: SparkConfig) -> list[str]:
    one = config.stage1
    solutions = one.solutions_per_problem
    votes = solutions * one.verifications_per_solution
    problems, basis = _count(config.data.stage1_problems)
    tokens = (
        solutions * one.generator_sampling.max_new_tokens
        + votes * one.verifier_sampling.max_new_tokens
    )
    lines = [
        f"stage I      {basis}: {problems * solutions:,} solutions, {problems * votes:,} verifications, at most "
        f"{problems * tokens:,} generated tokens"
    ]
    if one.meta_critique:
        revised = problems * solutions * len(one.meta_critique)
        lines.append(
            f"stage I      critiques of the picks by {', '.join(one.meta_critique)}: {basis}, at most {revised:,} "
            f"and as many merges, {2 * revised * one.revised_with.max_new_tokens:,} generated tokens"
        )
    if one.reference_answers is not None:
        shown = problems * solutions * one.num_reference_verifications
        lines.append(
            f"stage I      reference_guided, READS ANSWER KEYS: {basis}, {shown:,} verifications of at most "
            f"{shown * one.verifier_sampling.max_new_tokens:,} tokens"
        )
    return lines


def _reward_models(config: SparkConfig, parts: Parts) -> list[str]:
    two = config.stage2
    problems, basis = _count(config.data.stage1_problems)
    examples = problems * config.stage1.solutions_per_problem
    return [
        f"labels       {_selection(config)}",
        *(
            f"stage II     {method}, {variant}: {basis}, at most {examples:,} examples x {two.epochs} epochs, "
            f"{examples * two.epochs * two.max_length:,} trained tokens"
            for method, variant in parts.stage2
        ),
    ]


def _training(config: SparkConfig, arm: RLVariant) -> list[str]:
    rl = config.rl
    rollouts = rl.steps * rl.prompts_per_step * rl.group_size
    verified = "no verifications"
    if arm.variant:
        judged = rollouts * rl.reward.votes
        tokens = judged * rl.reward.sampling.max_new_tokens
        # A verification that fails may be tried again; that is not the expected case but belongs to
        # a bound.
        retries = rl.reward.retries
        verified = (
            f"{judged:,} verifications of at most {tokens:,} tokens, {tokens * (1 + retries):,} if all were "
            f"retried {retries} times"
        )
    note = ", READS ANSWER KEYS" if arm.reads_answer_keys else ""
    samples, evals = config.evaluation.samples_per_problem + 1, -(-rl.steps // rl.eval_every) + 1
    held, basis = _count(config.data.eval_problems)
    return [
        f"stage III    {arm.name}{note}: {rl.steps} steps, {rollouts:,} rollouts of at most "
        f"{rollouts * rl.sampling.max_new_tokens:,} tokens, {verified}",
        f"evaluation   {arm.name}: {basis}, {evals} times, {evals * held * samples:,} "
        f"completions of at most {evals * held * samples * config.evaluation.max_new_tokens:,} tokens",
    ]


def _selection(config: SparkConfig) -> str:
    labels = config.labels
    if labels.balance == "none":
        limit = (
            "no limit" if labels.max_per_problem is None else f"at most {labels.max_per_problem}"
        )
        return f"not balanced, {limit} per problem"
    by = (
        "answer keys, READS ANSWER KEYS"
        if labels.balance == "ground_truth"
        else "the labels' own verdicts"
    )
    return f"balanced by {by}, at most {labels.max_per_verdict or 3} + {labels.max_per_verdict or 3} per problem"


def _read_fields(parts: Parts, part: str) -> list[str]:
    """Settings that name data files; those with answer keys may be unset."""
    read = [name for spec in parts.specs for name in spec.data]
    for spec in parts.specs:
        read += [name for name in spec.answer_keys if name != "data.rl_answers"]
    if any(variant.reads_answer_keys for variant in parts.stage3):
        read.append("pipeline.rl_answers" if part == "pipeline" else "data.rl_answers")
    return read


def _files(config: SparkConfig, parts: Parts, part: str) -> list[str]:
    lines = []
    for field in _read_fields(parts, part):
        if value := setting(config, field):
            state = (
                "made on the run"
                if value.startswith("toy:")
                else "here"
                if Path(value).exists()
                else "missing"
            )
            lines.append(f"reads        {field}: {value} ({state})")
    whole = part == "pipeline"
    written = [
        *(["config.yaml"] if whole else []),
        *(["sft/model"] if parts.sft else []),
        *(["stage1/store"] if parts.stage1 else []),
        *(f"stage2/{stage2_folder(config.run, *model).name}/model" for model in parts.stage2),
        *(f"stage3/{arm.name}/model" for arm in parts.stage3),
        *(["summary.json", "report.html"] if whole else []),
    ]
    return [*lines, *(f"writes       {config.run.dir}/{name}" for name in written)]


def _engine(config: SparkConfig, parts: Parts) -> list[str]:
    engine = config.engine
    if parts == Parts(sft=True):
        return []
    if engine.kind != "local":
        return [
            f"engine       {engine.kind}, {role} pool: " + _servers(engine.pool(role))
            for role in POOLS
        ]
    if all(value is None or value.startswith("toy:") for value in vars(config.models).values()):
        return []
    return [
        f"engine       engine.kind={config.engine.kind} is the embedded engine, for small Qwen2 models: add "
        "+engine=sglang (servers on this machine), or name servers in engine.policy.urls and engine.verifier.urls"
    ]


def _servers(pool: PoolConfig) -> str:
    if pool.urls:
        return f"{len(pool.urls)} given: {', '.join(pool.urls)}"
    if pool.servers is None:
        return "none configured: a stage that asks it will be refused"
    router = ", behind sglang-router" if pool.router else ""
    return f"{pool.servers} to launch here, tensor parallel {pool.tensor_parallel or 1}{router}"


def _count(value: str, unit: str = "problem") -> tuple[int, str]:
    """Problems of a file and how to say it; per problem where the file is not here."""
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
    """config.json of the folder, else the published one for its name, else that of what it is made
    from, else None.
    """
    folder = Path(setting(config, field))
    if (folder / "config.json").exists():
        return read_hf_config(folder)
    source = {"models.policy": "models.policy_base", "rl.reward.model": "models.reward_base"}.get(
        field
    )
    if (
        folder.name == "model" and source is not None and setting(config, source)
    ):  # what sft and stage II write
        return _hf_config(config, source)
    return PUBLISHED.get(folder.name)


def _context(shape: dict[str, Any]) -> int:
    return shape.get("max_position_embeddings", 32768)
