"""The work of one step of a stage: tokens to train on, and texts to generate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from spark_nemo.config import ConfigError, SparkConfig
from spark_nemo.config.errors import one_of
from spark_nemo.config.rl import KLPenalty
from spark_nemo.megatron.sizing.rank import TrainBatch
from spark_nemo.models.hf_config import read_hf_config
from spark_nemo.models.spec import ModelSpec
from spark_nemo.planning.dry_run import PROMPT_TOKENS
from spark_nemo.planning.known_models import PUBLISHED

PROBLEMS = 1000
"""Number of problems that stage I's times are for."""
STAGES = ("stage1", "stage2", "stage3", "sft")


@dataclass(frozen=True)
class Model:
    """A model by its name and sizes."""

    name: str
    spec: ModelSpec


@dataclass(frozen=True)
class Generation:
    """Texts that one pool of engines generates in a step."""

    role: str
    model: Model
    prompts: int
    """Different prompts."""
    sequences: int
    """Texts: several may answer one prompt."""
    prompt_tokens: int
    """The limit of a prompt."""
    new_tokens: int
    """The limit of a text, not its mean."""

    @property
    def context(self) -> int:
        """Tokens of the longest text with its prompt."""
        return self.prompt_tokens + self.new_tokens


@dataclass(frozen=True)
class Training:
    """Work of the trainer in a step."""

    model: Model
    sequences: int
    longest: int
    """Tokens of the longest sequence; memory is planned as if all were this long."""
    updates: int = 1
    """Optimizer steps that divide the sequences."""
    forward_passes: int = 0
    """Passes over all sequences before: reference and old log-probabilities."""
    snapshots: int = 0
    """Copies of the weights in host memory."""
    syncs: bool = False
    """True if the new weights go to engines."""

    def batch(self, data_parallel: int, tokens_per_micro_batch: int) -> TrainBatch:
        """Return one data-parallel rank's largest share of one update."""
        sequences = -(-self.sequences // (self.updates * data_parallel))
        tokens = min(max(tokens_per_micro_batch, self.longest), sequences * self.longest)
        return TrainBatch(tokens, -(-sequences * self.longest // tokens))


@dataclass(frozen=True)
class Workload:
    """One step of a stage; for stage I ``PROBLEMS`` problems."""

    stage: str
    training: Training | None
    generations: tuple[Generation, ...]


def workload(config: SparkConfig, stage: str, model: str | None = None) -> Workload:
    """Return the work of one step of ``stage``.

    ``model`` (a folder or a published name) replaces the model that it trains, in stage I the
    generator. Raises ``ConfigError`` for a model that is neither here nor known by name.
    """
    one_of("--stage", stage, STAGES)
    if stage == "stage1":
        return Workload(stage, None, _stage1(config, model))
    work = training(config, stage, model)
    return Workload(stage, work, _stage3(config, work) if stage == "stage3" else ())


def training(config: SparkConfig, stage: str, model: str | None = None) -> Training:
    """Return what ``stage`` (not stage1) trains; no other model is read."""
    if stage == "stage2":
        trained = find_model(model or config.models.reward_base, "models.reward_base")
        return Training(
            trained,
            config.stage2.batch_size,
            min(config.stage2.max_length, trained.spec.max_positions),
        )
    if stage == "sft":
        trained = find_model(
            model or config.models.policy_base or config.models.policy, "models.policy_base"
        )
        return Training(
            trained, config.sft.batch_size, min(config.sft.max_length, trained.spec.max_positions)
        )
    rl = config.rl
    trained = find_model(model or config.models.policy, "models.policy", config.models.policy_base)
    new, has_reference = rl.sampling.max_new_tokens, isinstance(rl.kl, KLPenalty)
    return Training(
        trained,
        rl.prompts_per_step * rl.group_size,
        _prompt_tokens(trained, new) + new,
        rl.loss.num_minibatches,
        has_reference + (rl.loss.num_minibatches > 1),
        2 if has_reference else 0,
        syncs=True,
    )


def _stage1(config: SparkConfig, model: str | None) -> tuple[Generation, ...]:
    one = config.stage1
    generator = find_model(model or config.models.generator, "models.generator")
    verifier = (
        find_model(config.models.verifier, "models.verifier")
        if config.models.verifier
        else generator
    )
    written = one.generator_sampling.max_new_tokens
    solutions = PROBLEMS * one.solutions_per_problem
    return (
        Generation("policy", generator, PROBLEMS, solutions, PROMPT_TOKENS, written),
        Generation(
            "verifier",
            verifier,
            solutions,
            solutions * one.verifications_per_solution,
            PROMPT_TOKENS + written,
            one.verifier_sampling.max_new_tokens,
        ),
    )


def _stage3(config: SparkConfig, work: Training) -> tuple[Generation, ...]:
    rl, policy, new = config.rl, work.model, config.rl.sampling.max_new_tokens
    generations = [
        Generation(
            "policy", policy, rl.prompts_per_step, work.sequences, _prompt_tokens(policy, new), new
        )
    ]
    if rl.asks_reward_model:
        name = config.models.reward_base if rl.reward.model == "auto" else rl.reward.model
        verifier = (
            find_model(name, "rl.reward.model", config.models.reward_base) if name else policy
        )
        generations.append(
            Generation(
                "verifier",
                verifier,
                work.sequences,
                work.sequences * rl.reward.votes,
                PROMPT_TOKENS + new,
                rl.reward.sampling.max_new_tokens,
            )
        )
    return tuple(generations)


def find_model(name: str, field: str, made_from: str | None = None) -> Model:
    """Return a model by its folder, by the published name of the folder, or by its base model.

    The base model is used for a folder that sft has yet to write.
    """
    if not name:
        raise ConfigError(
            f"{field} is not set: pass --model, or an experiment that names its models"
        )
    folder = Path(name)
    if (folder / "config.json").exists():
        config = read_hf_config(folder)
    elif folder.name in PUBLISHED:
        config = PUBLISHED[folder.name]
    elif made_from and folder.name == "model":
        return find_model(made_from, field)
    else:
        raise ConfigError(
            f"{field}={name}: no config.json there (hf download NAME config.json "
            f"--local-dir FOLDER fetches it alone), "
            f"and the name is not one of {', '.join(PUBLISHED)}"
        )
    return Model(folder.name, ModelSpec.from_hf(config, f"{name}/config.json"))


def _prompt_tokens(model: Model, new_tokens: int) -> int:
    """Return the tokens for a prompt: the usual number, or fewer if the context is short."""
    return max(1, min(PROMPT_TOKENS, model.spec.max_positions - new_tokens))
