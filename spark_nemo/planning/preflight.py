"""Checks before a model is loaded: one error that names the setting or file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spark_nemo.config import ConfigError, EvaluationConfig, SamplingConfig, SparkConfig
from spark_nemo.config.designs import check_variant, reads_answer_keys
from spark_nemo.config.reward import HeldoutVerifier
from spark_nemo.config.rollout import DynamicSampling
from spark_nemo.engines.base import EngineFailure
from spark_nemo.engines.local import read_spec
from spark_nemo.engines.served_model import GRAMMAR_TEXTS
from spark_nemo.engines.tokenizer import Tokenizer, TokenizerError
from spark_nemo.evaluation.answers import read_answer_keys
from spark_nemo.evaluation.math_data import read_math
from spark_nemo.evaluation.processbench import read_processbench
from spark_nemo.grammar import prompt_set
from spark_nemo.models.hf_config import read_hf_config
from spark_nemo.models.spec import ModelSpec
from spark_nemo.records import Problem
from spark_nemo.records.problems import read_problems
from spark_nemo.run.rl_variants import pipeline_rl_variants, rl_variant_config
from spark_nemo.run.run_folder import read_done, reward_model_path
from spark_nemo.run.stage_spec import required_setting, setting
from spark_nemo.training.policy_examples import read_policy_examples
from spark_nemo.weight_sync.engine_view import check_server_args, check_syncable

_SLACK = 16
"""Tokens by which the template's length may differ between questions."""


def check_sft(config: SparkConfig) -> None:
    """Check the base model, its layout and context, and that the examples exist."""
    if not config.models.policy_base:
        raise ConfigError(
            "models.policy_base is not set: name the model that is to learn the policy's format"
        )
    spec = _model(Path(config.models.policy_base), "models.policy_base")
    spec.check_layout(config.megatron)
    if config.sft.max_length > spec.max_positions:
        raise ConfigError(
            f"sft.max_length={config.sft.max_length}: "
            f"models.policy_base={config.models.policy_base} has a context of {spec.max_positions}"
        )
    if not Path(required_setting(config, "data.sft_examples")).is_file():
        raise ConfigError(
            f"data.sft_examples={config.data.sft_examples}: no such file (JSONL with problem_id, "
            "question and response)"
        )


def check_stage1(config: SparkConfig) -> None:
    """Check problems, models, engines, samplings. Raises ``ConfigError`` or ``DataFileError``."""
    stage = config.stage1
    engine = config.engine
    engine.require("policy")
    engine.require("verifier")
    _served_model(config, "models.generator")
    _served_model(config, "models.verifier")
    read_problems(required_setting(config, "data.stage1_problems"))
    if stage.reuse_solutions_from is not None and not Path(stage.reuse_solutions_from).is_dir():
        raise ConfigError(
            f"stage1.reuse_solutions_from={stage.reuse_solutions_from}: no store there; "
            "name the stage1/store of an earlier run"
        )
    _fits(config, "stage1.generator_sampling", stage.generator_sampling)
    _fits(config, "stage1.verifier_sampling", stage.verifier_sampling)
    if stage.meta_critique:
        _fits(config, "stage1.revision_sampling", stage.revised_with)
    critic_runs = stage.meta_critique or stage.reference_answers is not None
    if config.models.critic is not None and critic_runs:
        if engine.pool("verifier").urls:
            raise ConfigError(
                f"models.critic={config.models.critic}: engine.verifier.urls serve the verifier; "
                "let the verifier criticise (models.critic=null), or launch servers with "
                "engine.verifier.servers"
            )
        _served_model(config, "models.critic")
    if stage.reference_answers is not None:
        _has_answers(config, "stage1.reference_answers", "data.stage1_problems")


def check_stage2(config: SparkConfig) -> None:
    """Check the base model, its layout and engine, evaluation cases, and a baseline's answers."""
    _trained_model(config, "models.reward_base")
    if config.labels.balance == "ground_truth":
        _has_answers(config, "labels.reference_answers", "data.stage1_problems")
    cases = read_processbench(required_setting(config, "data.processbench"))
    labels = [case.label for case in cases]
    config.engine.require("verifier")
    # -1 marks a case without an error.
    if -1 not in labels or max(labels) == -1:
        raise ConfigError(
            f"data.processbench={config.data.processbench}: a score needs cases with an error and "
            "without"
        )
    _fits(config, "stage2.eval_sampling", config.stage2.eval_sampling)


def check_stage3(config: SparkConfig, *, reward_model_comes_later: bool = False) -> None:
    """Check the policy, its layout, the problems, and everything that the chosen reward reads."""
    rl = config.rl
    if config.engine.kind == "vllm":
        raise ConfigError(
            "engine.kind=vllm: its weights are not updated by this package, so it serves "
            "stage I and evaluation only; stage III needs sglang or local"
        )
    config.engine.require("policy")
    if rl.asks_reward_model:
        config.engine.require("verifier")
    policy = Path(required_setting(config, "models.policy"))
    made_by_sft = config.models.policy_base and policy.parts[-2:] == ("sft", "model")
    if made_by_sft and not (policy / "config.json").exists():
        raise ConfigError(
            f"models.policy={config.models.policy}: no model there; `spark-nemo sft` makes it of "
            f"models.policy_base={config.models.policy_base}"
        )
    _trained_model(config, "models.policy")
    spec = check_sync(read_hf_config(config.models.policy), "models.policy")
    check_server_args(spec, config.engine.policy.server_args, "engine.policy.server_args")
    problems = read_problems(required_setting(config, "data.rl_problems"))
    held_out = read_math(required_setting(config, "data.eval_problems"))
    _fits(config, "rl.sampling", rl.sampling)
    _fits(config, "evaluation", config.evaluation)
    if not isinstance(rl.rollout.filter, DynamicSampling) and rl.prompts_per_step > len(problems):
        raise ConfigError(
            f"rl.prompts_per_step={rl.prompts_per_step}: "
            f"data.rl_problems={config.data.rl_problems} has {len(problems)} problems, "
            "and a step draws none twice"
        )
    _prompts_fit(config, "data.rl_problems", problems, "rl.sampling", rl.sampling.max_new_tokens)
    _prompts_fit(
        config,
        "data.eval_problems",
        [one.problem for one in held_out],
        "evaluation",
        config.evaluation.max_new_tokens,
    )
    if rl.sampling.temperature == 0:
        raise ConfigError(
            "rl.sampling.temperature=0: a group of equal responses has no advantage; use 1.0"
        )
    if reads_answer_keys(rl.design):
        if config.data.rl_answers is None:
            raise ConfigError(
                f"rl/reward={rl.design} needs data.rl_answers (JSONL with problem_id and answer)"
            )
        _has_answers(config, "data.rl_answers", "data.rl_problems")
    if not rl.asks_reward_model:
        return
    _fits(config, "rl.reward.sampling", rl.reward.sampling)
    assert config.reward_variant is not None, "the reward asks a model"
    check_variant(rl.design, config.reward_variant, "rl.reward.variant (or stage2.variant)")
    if not reward_model_comes_later:
        folder = reward_model_folder(config)
        _served_folder(config, folder, "rl.reward.model")
        done = read_done(folder.parent) or {}
        trained_as = done.get("variant", config.reward_variant)
        if trained_as != config.reward_variant:
            raise ConfigError(
                f"rl.reward.variant={config.reward_variant} (or stage2.variant): {folder} was "
                f"trained as {trained_as}; set rl.reward.variant={trained_as} "
                "or name another rl.reward.model"
            )
    if isinstance(rl.reward.heldout, HeldoutVerifier):
        model = rl.reward.heldout.model
        if config.engine.kind != "local" and config.engine.pool("verifier").urls:
            raise ConfigError(
                f"rl.reward.heldout.model={model}: engine.verifier.urls serve "
                "the reward model; launch servers with engine.verifier.servers"
            )
        _served_folder(config, Path(model), "rl.reward.heldout.model")


def check_pipeline(config: SparkConfig) -> None:
    """Check every stage of the pipeline and every RL variant before the first one starts."""
    check_stage1(config)
    if config.pipeline.label_methods:
        check_stage2(config)
    for variant in pipeline_rl_variants(config):
        try:
            check_stage3(
                rl_variant_config(config, variant),
                reward_model_comes_later=variant.comes_from_stage2(config),
            )
        except ConfigError as error:
            raise ConfigError(f"stage III, RL variant {variant.name}: {error}") from error
    if config.pipeline.rl_answers is not None:
        read_answer_keys(config.pipeline.rl_answers)


def check_data_here(config: SparkConfig, fields: Sequence[str]) -> None:
    """Read every file of these settings that is on this machine, row by row.

    A job would report a bad row only after its wait in the queue. Raises ``DataFileError``.
    """
    for field in fields:
        path = setting(config, field)
        if not path or not Path(path).exists():
            continue
        match field.rpartition(".")[2]:
            case "eval_problems":
                read_math(path)
            case "processbench":
                read_processbench(path)
            case "sft_examples":
                read_policy_examples(path, drop_invalid=config.sft.on_invalid == "drop")
            case "rl_answers" | "reference_answers":
                read_answer_keys(path)
            case _:
                read_problems(path)


def reward_model_folder(config: SparkConfig) -> Path:
    """Return ``reward_model_path``. Raises ``ConfigError`` if it does not hold a model."""
    folder = reward_model_path(config)
    if not (folder / "config.json").exists():
        raise ConfigError(
            f"rl.reward.model={folder}: no model there; run `spark-nemo stage2` or name one"
        )
    return folder


def _has_answers(config: SparkConfig, answers: str, problems: str) -> None:
    """Raise ``ConfigError`` unless every problem of one file has an answer in the other."""
    path = required_setting(config, answers)
    ids = {problem.problem_id for problem in read_problems(required_setting(config, problems))}
    missing = ids - read_answer_keys(path).keys()
    if missing:
        raise ConfigError(
            f"{answers}={path}: no answer for {len(missing)} of {problems}, {min(missing)} first"
        )


def check_sync(hf_config: Mapping[str, Any], field: str) -> ModelSpec:
    """Read the sizes of a policy. Raises ``ConfigError`` if weight sync does not support it."""
    try:
        spec = ModelSpec.from_hf(hf_config)
        check_syncable(spec)
    except ConfigError as error:
        raise ConfigError(
            f"{field}: {error}: stage III cannot train it; name another policy"
        ) from error
    return spec


def _served_model(config: SparkConfig, field: str) -> None:
    _served_folder(config, Path(required_setting(config, field)), field)


def _served_folder(config: SparkConfig, folder: Path, field: str) -> ModelSpec:
    """Check a model that an engine serves."""
    spec = _model(folder, field)
    if config.engine.kind == "local":
        try:
            read_spec(folder)
        except EngineFailure as error:
            raise ConfigError(f"{field}: {error} (add +engine=sglang)") from error
    return spec


def _trained_model(config: SparkConfig, field: str) -> None:
    """Check a model that is trained, and that the stage's engine serves afterwards."""
    spec = _served_folder(config, Path(required_setting(config, field)), field)
    spec.check_layout(config.megatron)


def _model(folder: Path, field: str) -> ModelSpec:
    try:
        spec = ModelSpec.from_hf(read_hf_config(folder), f"{folder}/config.json")
        Tokenizer.load(folder).require_tokens(GRAMMAR_TEXTS)
    except (ConfigError, TokenizerError) as error:
        raise ConfigError(f"{field}: {error}") from error
    return spec


def _prompts_fit(
    config: SparkConfig,
    field: str,
    problems: Sequence[Problem],
    sampling: str,
    max_new_tokens: int,
) -> None:
    """Check that every prompt and its response fit the engine's context.

    An engine rejects a longer prompt: the run would end at the step that draws it.
    """
    tokenizer = Tokenizer.load(config.models.policy)
    prompts = prompt_set(config.rl.prompt_set)
    limit = config.engine.max_context - max_new_tokens
    # A token has at least one byte, so only long questions are encoded: encoding all 17,000 of a
    # usual data set would take seconds.
    template = len(tokenizer.encode_chat(prompts.policy("?"))) + _SLACK
    too_long = {}
    for problem in problems:
        if template + len(problem.question.encode()) > limit:
            length = len(tokenizer.encode_chat(prompts.policy(problem.question)))
            if length > limit:
                too_long[problem.problem_id] = length
    if too_long:
        name, length = next(iter(too_long.items()))
        raise ConfigError(
            f"{field}={required_setting(config, field)}: {len(too_long)} of {len(problems)} "
            f"prompts are too long for {sampling}.max_new_tokens={max_new_tokens} in "
            f"engine.max_context={config.engine.max_context}, the first is {name} with {length} "
            "tokens; remove them, or change one of the two"
        )


def _fits(config: SparkConfig, field: str, sampling: SamplingConfig | EvaluationConfig) -> None:
    if sampling.max_new_tokens >= config.engine.max_context:
        raise ConfigError(
            f"{field}.max_new_tokens={sampling.max_new_tokens}: leaves no tokens for a prompt in "
            f"engine.max_context={config.engine.max_context}; lower one or raise the other"
        )
