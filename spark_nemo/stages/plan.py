"""``pipeline --dry-run``: what a configuration would do, from the configuration alone. Starts and writes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spark_nemo.config import ConfigError, PoolConfig, SparkConfig
from spark_nemo.config.engine import POOLS
from spark_nemo.megatron.model_shape import ModelShape, read_hf_config
from spark_nemo.stages.arms import arm_config, pipeline_arms
from spark_nemo.stages.run_folder import stage2_folder

PROMPT_ROOM = 1024
"""Tokens that must be left for a problem: the longest prompt of the paper's policy SFT."""
_GPUS_PER_NODE = 8


def _qwen(layers: int, hidden: int, heads: int, kv_heads: int, ffn: int, context: int) -> dict[str, Any]:
    return {"model_type": "qwen2", "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads,
            "num_key_value_heads": kv_heads, "intermediate_size": ffn, "vocab_size": 152064,
            "max_position_embeddings": context}


PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen2.5-14B-Instruct": _qwen(48, 5120, 40, 8, 13824, 32768),
    "Qwen2.5-72B-Instruct": _qwen(80, 8192, 64, 8, 29568, 32768),
    "Qwen2.5-Math-7B": _qwen(28, 3584, 28, 4, 18944, 4096),
    "Qwen2.5-Math-72B": _qwen(80, 8192, 64, 8, 29568, 4096),
    "Qwen3-32B": {**_qwen(64, 5120, 64, 8, 25600, 40960), "model_type": "qwen3", "head_dim": 128,
                  "vocab_size": 151936},
}
"""config.json of the recipes' models by folder name, so that a recipe can be checked before 100 GB are downloaded."""


def dry_run(config: SparkConfig) -> str:
    """Validate what needs no files and describe the run, one fact per line.

    Token counts are upper bounds: every generation at its limit. Raises ``ConfigError`` for a layout that does not fit
    a trained model, or a context that leaves no room for a prompt.
    """
    check_without_files(config)
    return "\n".join([f"run.dir      {config.run.dir}, seed {config.run.seed}", *_models(config), *_ranks(config),
                      *_generations(config), *_files(config), *_engine(config)])


def check_without_files(config: SparkConfig) -> None:
    """Names set, layouts, contexts, and what the pipeline's parts need of each other. Raises ``ConfigError``."""
    _required_names(config)
    trained = ["models.reward_base"] if config.pipeline.label_methods else []
    for field in [*trained, *(["models.policy"] if config.pipeline.rewards else [])]:
        if (shape := _hf_config(config, field)) is not None:
            ModelShape.from_hf(shape, field).check_layout(config.megatron)
    for field, model, needs, limit in _texts(config):
        limit = min(limit, config.engine.max_context)
        if needs > limit:
            raise ConfigError(
                f"{field}: {needs} tokens with {PROMPT_ROOM} for the problem, but {model}={_value(config, model)} has "
                f"a context of {limit} here: lower max_new_tokens" + (
                    "" if limit < config.engine.max_context else " or raise engine.max_context"))
    for arm in pipeline_arms(config):
        arm_config(config, arm)
        if arm.comes_from_stage2(config) and config.stage2.method not in config.pipeline.label_methods:
            raise ConfigError(f"stage2.method={config.stage2.method} rewards stage III: add it to "
                              "pipeline.label_methods")


def _required_names(config: SparkConfig) -> None:
    needed = ["models.generator", "models.verifier", "data.stage1_problems"]
    needed += ["models.reward_base", "data.processbench"] if config.pipeline.label_methods else []
    needed += ["models.policy", "data.rl_problems", "data.eval_problems"] if config.pipeline.rewards else []
    for field in needed:
        if not _value(config, field):
            raise ConfigError(f"{field} is not set")


def _texts(config: SparkConfig) -> Iterator[tuple[str, str, int, int]]:
    """``(field, model field, tokens of its longest text, the model's context)`` of every kind of generation."""
    written = config.stage1.generator_sampling.max_new_tokens
    rows = [("stage1.generator_sampling", "models.generator", written),
            ("stage1.verifier_sampling", "models.verifier", written + config.stage1.verifier_sampling.max_new_tokens)]
    if config.stage1.revise:  # a merge reads solution, verification and critique
        text = config.stage1.revised_with.max_new_tokens
        rows.append(("stage1.revision_sampling", "models.critic" if config.models.critic else "models.verifier",
                     written + config.stage1.verifier_sampling.max_new_tokens + 2 * text))
    if config.pipeline.rewards:
        response = config.rl.sampling.max_new_tokens
        rows += [("rl.sampling", "models.policy", response),
                 ("evaluation", "models.policy", config.evaluation.max_new_tokens)]
        if any(arm.variant for arm in pipeline_arms(config)):
            rows.append(("rl.verifier_sampling", "models.reward_base",
                         response + config.rl.verifier_sampling.max_new_tokens))
    for field, model, tokens in rows:
        shape = _hf_config(config, model)
        # A model of unknown size, such as the small world's, is checked when it is loaded.
        if shape is not None:
            yield field, model, PROMPT_ROOM + tokens, shape.get("max_position_embeddings", 32768)


def _models(config: SparkConfig) -> list[str]:
    lines = []
    for name, value in vars(config.models).items():
        if value is None:
            continue
        shape = _hf_config(config, f"models.{name}")
        size = (f"{shape['model_type']}, {shape['num_hidden_layers']} layers, context "
                f"{shape.get('max_position_embeddings', 32768):,}") if shape else "size unknown before it is loaded"
        here = "" if value.startswith("toy:") or (Path(value) / "config.json").exists() else "; not on this machine"
        lines.append(f"model        {name}: {value} ({size}{here})")
    if (shape := _hf_config(config, "models.policy")) and config.pipeline.rewards:
        context = min(config.engine.max_context, shape.get("max_position_embeddings", 32768))
        room = context - config.rl.sampling.max_new_tokens
        lines.append(f"context      policy: {room:,} prompt + {config.rl.sampling.max_new_tokens:,} response tokens; "
                     f"no setting drops longer prompts, data.rl_problems must not have any")
    return lines


def _ranks(config: SparkConfig) -> list[str]:
    m, world = config.megatron, config.megatron.world_size
    return [f"ranks        {world} trainer ranks = TP {m.tensor_parallel} x PP {m.pipeline_parallel} x DP "
            f"{m.data_parallel}, {-(-world // _GPUS_PER_NODE)} node(s) of {_GPUS_PER_NODE} GPUs; every stage the same"]


def _generations(config: SparkConfig) -> list[str]:
    one, two, rl = config.stage1, config.stage2, config.rl
    solutions = one.solutions_per_problem
    votes = solutions * one.verifications_per_solution
    problems, basis = _count(config.data.stage1_problems)
    tokens = solutions * one.generator_sampling.max_new_tokens + votes * one.verifier_sampling.max_new_tokens
    lines = [f"stage I      {basis}: {problems * solutions:,} solutions, {problems * votes:,} verifications, at most "
             f"{problems * tokens:,} generated tokens"]
    if one.revise:
        revised = problems * solutions * len(one.revise)
        lines.append(f"stage I      critiques of the picks by {', '.join(one.revise)}: {basis}, at most {revised:,} "
                     f"and as many merges, {2 * revised * one.revised_with.max_new_tokens:,} generated tokens")
    if one.reference_answers is not None:
        shown = problems * solutions * one.num_reference_verifications
        lines.append(f"stage I      reference_guided, READS ANSWER KEYS: {basis}, {shown:,} verifications of at most "
                     f"{shown * one.verifier_sampling.max_new_tokens:,} tokens")
    lines.append(f"labels       {_selection(config)}")
    for method in config.pipeline.label_methods:
        examples = problems * solutions
        for variant in config.reward_models if method == two.method else [two.variant]:
            lines.append(f"stage II     {method}, {variant}: {basis}, at most {examples:,} examples x {two.epochs} "
                         f"epochs, {examples * two.epochs * two.max_length:,} trained tokens")
    for arm in pipeline_arms(config):
        rollouts = rl.steps * rl.prompts_per_step * rl.group_size
        judged = rollouts * rl.verifier_votes if arm.variant else 0
        # A verification that fails may be tried again; that is not the expected case but belongs to a bound.
        judged_tokens = judged * (1 + rl.failures.retries) * rl.verifier_sampling.max_new_tokens
        note = ", READS ANSWER KEYS" if arm.reads_answer_keys else ""
        lines.append(f"stage III    {arm.name}{note}: {rl.steps} steps, {rollouts:,} rollouts of at most "
                     f"{rollouts * rl.sampling.max_new_tokens:,} tokens, {judged:,} verifications of at most "
                     f"{judged_tokens:,} tokens with all retries")
        samples = config.evaluation.samples_per_problem + 1
        evals = rl.steps // rl.eval_every + 1
        held, held_basis = _count(config.data.eval_problems)
        lines.append(f"evaluation   {arm.name}: {held_basis}, about {evals} times, {evals * held * samples:,} "
                     f"completions of at most {evals * held * samples * config.evaluation.max_new_tokens:,} tokens")
    return lines


def _selection(config: SparkConfig) -> str:
    labels = config.labels
    if labels.balance == "none":
        limit = "no limit" if labels.max_per_problem is None else f"at most {labels.max_per_problem}"
        return f"not balanced, {limit} per problem"
    by = "answer keys, READS ANSWER KEYS" if labels.balance == "ground_truth" else "the labels' own verdicts"
    return f"balanced by {by}, at most {labels.max_per_verdict or 3} + {labels.max_per_verdict or 3} per problem"


def _files(config: SparkConfig) -> list[str]:
    read = {f"data.{name}": value for name, value in vars(config.data).items() if value}
    answers = {"pipeline.rl_answers": config.pipeline.rl_answers,
               "stage1.reference_answers": config.stage1.reference_answers,
               "labels.reference_answers": config.labels.reference_answers}
    read |= {field: value for field, value in answers.items() if value}
    lines = []
    for field, value in read.items():
        state = "made on the run" if value.startswith("toy:") else "here" if Path(value).exists() else "missing"
        lines.append(f"reads        {field}: {value} ({state})")
    folder = config.run.dir
    models = [stage2_folder(config.run, method, variant).name for method in config.pipeline.label_methods
              for variant in (config.reward_models if method == config.stage2.method else [config.stage2.variant])]
    written = ["config.yaml", "stage1/store", *(f"stage2/{name}/model" for name in models),
               *(f"stage3/{arm.name}/model" for arm in pipeline_arms(config)), "summary.json", "report.html"]
    return [*lines, *(f"writes       {folder}/{name}" for name in written)]


def _engine(config: SparkConfig) -> list[str]:
    engine = config.engine
    if engine.kind != "local":
        return [f"engine       {engine.kind}, {role} pool: " + _servers(engine.pool(role)) for role in POOLS]
    if all(value is None or value.startswith("toy:") for value in vars(config.models).values()):
        return []
    return [f"engine       engine.kind={config.engine.kind} is the embedded engine, for small Qwen2 models: add "
            "+engine=sglang (servers on this machine), or name servers in engine.policy.urls and engine.verifier.urls"]


def _servers(pool: PoolConfig) -> str:
    if pool.urls:
        return f"{len(pool.urls)} given: {', '.join(pool.urls)}"
    if pool.servers is None:
        return "none configured: a stage that asks it will be refused"
    router = ", behind sglang-router" if pool.router else ""
    return f"{pool.servers} to launch here, tensor parallel {pool.tensor_parallel or 1}{router}"


def _count(value: str) -> tuple[int, str]:
    """Problems of a file and how to say it; per problem where the file is not here."""
    if value.startswith("toy:"):
        count = int(value.rpartition(":")[2])
        return count, f"{count:,} problems"
    if not Path(value).is_file():
        return 1, "per problem (the file is not here)"
    with open(value, "rb") as file:
        count = sum(1 for line in file if line.strip())
    return count, f"{count:,} problems"


def _value(config: SparkConfig, field: str) -> str:
    section, name = field.split(".")
    return getattr(getattr(config, section), name)


def _hf_config(config: SparkConfig, field: str) -> dict[str, Any] | None:
    """config.json of the folder, else the published one for its name, else None."""
    folder = Path(_value(config, field))
    if (folder / "config.json").exists():
        return read_hf_config(folder)
    return PUBLISHED.get(folder.name)
