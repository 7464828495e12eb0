"""Every setting of the system and its default. ``conf/`` only says what an experiment changes.

A value that nothing would read under the chosen options raises ``ConfigError``: such knobs default to None
("not set") so that a set value can be told from a default. Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .errors import ConfigError, at_least, in_unit_interval, one_of, without_effect

LABEL_METHODS = ("single", "outcome_consistency", "step_consistency")
MODEL_REWARDS = {"process_aware", "step_average", "step_augmented"}
ON_OUTCOME_ADVANTAGE = {"selective", "selective_half", "global_step"}
"""Per-token advantages that start from the estimator's."""
OWN_BASELINE = {"min_form", "prefix", "capo"}
"""Per-token advantages that read no estimator."""


@dataclass
class RunConfig:
    """Where results go and what makes a run reproducible."""

    dir: str = "runs/default"
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.dir:
            raise ConfigError("run.dir is empty: name a folder for the results")


@dataclass
class ModelsConfig:
    """Hugging Face model folders (config.json, safetensors, tokenizer).

    ``toy:generator`` and ``toy:verifier`` name the small world's shipped models.
    """

    generator: str = ""
    verifier: str = ""
    reward_base: str = ""
    """What stage II fine-tunes."""
    policy: str = ""
    """Where stage III starts."""


@dataclass
class DataConfig:
    """Problem files (JSONL with ``problem_id`` and ``question``), or ``toy:SPLIT:COUNT`` for the small world's."""

    stage1_problems: str = ""
    rl_problems: str = ""
    eval_problems: str = ""
    """With answers; read by evaluation only (and by the RLVR baseline through ``rl_answers``)."""
    rl_answers: str | None = None
    """Answer keys of ``rl_problems``: allowed only with ``rl.reward=rlvr``."""
    processbench: str = ""


@dataclass
class SamplingConfig:
    """How an engine draws tokens; ``temperature=0`` is greedy."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 2048

    def __post_init__(self) -> None:
        at_least("sampling.temperature", self.temperature, 0)
        at_least("sampling.max_new_tokens", self.max_new_tokens, 1)
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"sampling.top_p={self.top_p}: must lie in (0, 1]")
        if self.temperature == 0 and self.top_p < 1:
            raise without_effect("sampling.top_p", self.top_p, "with sampling.temperature=0 (greedy)")


@dataclass
class EngineConfig:
    """The engine that generates and verifies."""

    kind: str = "local"
    max_batch_size: int = 256
    """Sequences decoded together (KV-cache slots)."""
    max_context: int = 4096
    """Prompt plus response tokens that one slot can hold."""

    def __post_init__(self) -> None:
        one_of("engine.kind", self.kind, {"local"})
        at_least("engine.max_batch_size", self.max_batch_size, 1)
        at_least("engine.max_context", self.max_context, 8)


@dataclass
class MegatronConfig:
    """Parallel layout and numerics of every Megatron model in the run. Data parallel is what the ranks leave over."""

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    data_parallel: int = 1
    sequence_parallel: bool = False
    dtype: str = "bfloat16"
    recompute: str = "none"
    """Activation recomputation: none, selective or full."""
    distributed_optimizer: bool = True
    tokens_per_micro_batch: int = 8192
    """Packed tokens per micro-batch; a longer sequence gets a micro-batch of its own."""

    def __post_init__(self) -> None:
        for name in ("tensor_parallel", "pipeline_parallel", "data_parallel", "tokens_per_micro_batch"):
            at_least(f"megatron.{name}", getattr(self, name), 1)
        one_of("megatron.dtype", self.dtype, {"float32", "bfloat16"})
        one_of("megatron.recompute", self.recompute, {"none", "selective", "full"})
        if self.sequence_parallel and self.tensor_parallel == 1:
            raise without_effect("megatron.sequence_parallel", True, "with megatron.tensor_parallel=1")

    @property
    def world_size(self) -> int:
        """Number of trainer ranks."""
        return self.tensor_parallel * self.pipeline_parallel * self.data_parallel


@dataclass
class OptimizerConfig:
    """AdamW with linear warm-up and an optional decay."""

    lr: float = 1e-5
    min_lr: float = 0.0
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip_grad: float = 1.0
    warmup_fraction: float = 0.0
    """Share of all optimizer steps spent on linear warm-up."""
    decay: str = "constant"
    """constant, linear or cosine, from the end of warm-up to the last step."""

    def __post_init__(self) -> None:
        one_of("optimizer.decay", self.decay, {"constant", "linear", "cosine"})
        in_unit_interval("optimizer.warmup_fraction", self.warmup_fraction)
        if self.lr <= 0:
            raise ConfigError(f"optimizer.lr={self.lr}: must be positive")
        if self.decay == "constant" and self.min_lr:
            raise without_effect("optimizer.min_lr", self.min_lr, "with optimizer.decay=constant")


@dataclass
class FailurePolicy:
    """What a verification that gave no verdict costs. Nothing becomes a score unless this says so."""

    action: str = "mask"
    """mask: leave the sample out. penalise: give it ``penalty``."""
    penalty: float | None = None
    retries: int = 1
    """Fresh attempts before the action applies."""
    max_rate: float = 0.2
    """The run stops when more than this share of a step's verifications fail after their retries."""

    def __post_init__(self) -> None:
        one_of("failures.action", self.action, {"mask", "penalise"})
        at_least("failures.retries", self.retries, 0)
        in_unit_interval("failures.max_rate", self.max_rate)
        if self.action == "penalise" and self.penalty is None:
            raise ConfigError("failures.action=penalise needs failures.penalty (the reward of a failed verification)")
        if self.action == "mask" and self.penalty is not None:
            raise without_effect("failures.penalty", self.penalty, "with failures.action=mask")


@dataclass
class Stage1Config:
    """Verification data: M solutions per problem, N verifications per solution."""

    solutions_per_problem: int = 8
    verifications_per_solution: int = 16
    prompt_set: str = "paper"
    generator_sampling: SamplingConfig = field(
        default_factory=lambda: SamplingConfig(temperature=0.7, top_p=0.95, max_new_tokens=8192))
    verifier_sampling: SamplingConfig = field(
        default_factory=lambda: SamplingConfig(temperature=0.8, top_p=0.95, max_new_tokens=8192))
    num_shards: int = 1
    shard: int | None = None
    """Work on problems with index % num_shards == shard only (a Slurm array task); None does all."""
    max_failure_rate: float = 0.5
    """Stop when more than this share of solutions or verifications is unusable."""

    def __post_init__(self) -> None:
        at_least("stage1.solutions_per_problem", self.solutions_per_problem, 1)
        at_least("stage1.verifications_per_solution", self.verifications_per_solution, 1)
        at_least("stage1.num_shards", self.num_shards, 1)
        in_unit_interval("stage1.max_failure_rate", self.max_failure_rate)
        one_of("stage1.prompt_set", self.prompt_set, {"paper", "compact"})
        if self.shard is None and self.num_shards > 1:
            raise without_effect("stage1.num_shards", self.num_shards, "without stage1.shard")
        if self.shard is not None and not 0 <= self.shard < self.num_shards:
            raise ConfigError(f"stage1.shard={self.shard}: must lie in 0..{self.num_shards - 1} (stage1.num_shards)")


@dataclass
class Stage2Config:
    """Fine-tuning of the generative reward model on stage I labels."""

    method: str = "step_consistency"
    variant: str = "prm_cot"
    epochs: int = 2
    batch_size: int = 64
    """Sequences per optimizer step, over all data-parallel ranks."""
    max_length: int = 8192
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(warmup_fraction=0.03, decay="cosine"))
    save_every: int = 50
    eval_sampling: SamplingConfig = field(
        default_factory=lambda: SamplingConfig(temperature=0.0, max_new_tokens=4096))

    def __post_init__(self) -> None:
        one_of("stage2.method", self.method, set(LABEL_METHODS))
        one_of("stage2.variant", self.variant, {"orm", "prm", "prm_cot"})
        for name in ("epochs", "batch_size", "max_length", "save_every"):
            at_least(f"stage2.{name}", getattr(self, name), 1)


@dataclass
class RLConfig:
    """GRPO. The names follow the field: a *group* is the rollouts of one prompt."""

    steps: int = 100
    prompts_per_step: int = 256
    group_size: int = 16
    updates_per_step: int = 1
    """Optimizer steps per rollout batch; the batch is split by groups."""
    reward: str = "process_aware"
    """From the PRM-CoT's verdict: process_aware (format gate times final verdict), step_average, step_augmented.
    Baselines: rlvr (answer key, declared), majority (the group's own majority answer), random (a coin)."""
    advantage: str = "outcome"
    """Per response: outcome. Per token, from step labels: selective, selective_half, global_step, min_form, prefix or
    capo; all are defined on rl.reward=process_aware."""
    reward_model: str | None = None
    """Folder of the PRM-CoT; None takes stage II's result in ``run.dir``. Baselines have none."""
    prompt_set: str = "paper"
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    verifier_sampling: SamplingConfig = field(
        default_factory=lambda: SamplingConfig(temperature=0.0, max_new_tokens=4096))
    """How the PRM-CoT is sampled as a reward; not read by the baselines."""
    failures: FailurePolicy = field(default_factory=FailurePolicy)
    estimator: str = "grpo"
    """From rewards to one advantage per response: grpo, dr_grpo (no std), rloo or reinforce_pp (batch statistics)."""
    std_normalise: bool | None = None
    """Divide a group's centred rewards by their standard deviation; only read by grpo. None is True."""
    loss_aggregation: str | None = None
    """token_mean, sequence_mean or length_constant. None is token_mean; dr_grpo is length_constant and nothing else."""
    ratio: str = "token"
    """What is clipped: token, or sequence (GSPO; its objective is the one with loss_aggregation=sequence_mean). Only
    read when updates_per_step > 1."""
    clip_low: float | None = None
    """Lower clip of the ratio, 1 - clip_low; only read when updates_per_step > 1. None is 0.2."""
    clip_high: float | None = None
    """Upper clip of the ratio, 1 + clip_high; only read when updates_per_step > 1. None is 0.2."""
    kl_estimator: str = "none"
    """Estimator of KL(policy, reference) in the loss: none, k1, k2 or k3."""
    kl_coef: float | None = None
    importance_cap: float | None = 2.0
    """Truncated importance sampling between engine and trainer log-probabilities; None switches it off."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-6))
    eval_every: int = 10
    save_every: int = 50

    def __post_init__(self) -> None:
        for name in ("steps", "prompts_per_step", "updates_per_step", "eval_every", "save_every"):
            at_least(f"rl.{name}", getattr(self, name), 1)
        at_least("rl.group_size", self.group_size, 2)
        one_of("rl.reward", self.reward, MODEL_REWARDS | {"rlvr", "majority", "random"})
        if self.loss_aggregation is not None:
            one_of("rl.loss_aggregation", self.loss_aggregation, {"token_mean", "sequence_mean", "length_constant"})
        one_of("rl.kl_estimator", self.kl_estimator, {"none", "k1", "k2", "k3"})
        one_of("rl.prompt_set", self.prompt_set, {"paper", "compact"})
        if self.kl_estimator == "none" and self.kl_coef is not None:
            raise without_effect("rl.kl_coef", self.kl_coef, "with rl.kl_estimator=none")
        if self.kl_estimator != "none" and (self.kl_coef or 0) <= 0:
            raise ConfigError(f"rl.kl_estimator={self.kl_estimator} needs a positive rl.kl_coef")
        if self.updates_per_step > self.prompts_per_step:
            raise ConfigError(
                f"rl.updates_per_step={self.updates_per_step}: at most rl.prompts_per_step={self.prompts_per_step}")
        for name in ("clip_low", "clip_high"):
            value = getattr(self, name)
            if value is not None and self.updates_per_step == 1:
                raise without_effect(f"rl.{name}", value, "with rl.updates_per_step=1 (the ratio is always 1)")
            if value is not None and value <= 0:
                raise ConfigError(f"rl.{name}={value}: must be positive")
        if self.importance_cap is not None:
            at_least("rl.importance_cap", self.importance_cap, 1)
        if not self.asks_reward_model and self.reward_model is not None:
            raise without_effect("rl.reward_model", self.reward_model, f"with rl.reward={self.reward}")
        self._check_estimator()
        self._check_advantage()

    @property
    def asks_reward_model(self) -> bool:
        """Is the reward made from a PRM-CoT's verdicts?"""
        return self.reward in MODEL_REWARDS

    @property
    def aggregation(self) -> str:
        """``loss_aggregation``, resolved."""
        return self.loss_aggregation or ("length_constant" if self.estimator == "dr_grpo" else "token_mean")

    def _check_estimator(self) -> None:
        one_of("rl.estimator", self.estimator, {"grpo", "dr_grpo", "rloo", "reinforce_pp"})
        one_of("rl.ratio", self.ratio, {"token", "sequence"})
        if self.ratio != "token" and self.updates_per_step == 1:
            raise without_effect("rl.ratio", self.ratio, "with rl.updates_per_step=1 (the ratio is always 1)")
        if self.std_normalise is not None and self.estimator != "grpo":
            raise without_effect("rl.std_normalise", self.std_normalise, f"with rl.estimator={self.estimator}")
        if self.estimator == "dr_grpo" and self.aggregation != "length_constant":
            raise ConfigError(f"rl.loss_aggregation={self.loss_aggregation}: dr_grpo is length_constant; remove it or "
                              "choose rl.estimator=grpo with rl.std_normalise=false")

    def _check_advantage(self) -> None:
        one_of("rl.advantage", self.advantage, {"outcome"} | ON_OUTCOME_ADVANTAGE | OWN_BASELINE)
        if self.advantage != "outcome" and self.reward != "process_aware":
            raise ConfigError(f"rl.advantage={self.advantage} reads step labels and the verdict as its reward: "
                              f"choose rl.reward=process_aware instead of {self.reward}, or rl.advantage=outcome")
        if self.advantage in OWN_BASELINE:
            because = f"with rl.advantage={self.advantage} (it has a baseline of its own)"
            if self.estimator != "grpo":
                raise without_effect("rl.estimator", self.estimator, because)
            if self.std_normalise is not None:
                raise without_effect("rl.std_normalise", self.std_normalise, because)


@dataclass
class EvaluationConfig:
    """Held-out evaluation. Answer keys are read here and nowhere else."""

    samples_per_problem: int = 4
    temperature: float = 1.0
    max_new_tokens: int = 2048
    bootstrap_samples: int = 2000

    def __post_init__(self) -> None:
        for name in ("samples_per_problem", "max_new_tokens", "bootstrap_samples"):
            at_least(f"evaluation.{name}", getattr(self, name), 1)
        if self.temperature <= 0:
            raise ConfigError(f"evaluation.temperature={self.temperature}: must be positive (greedy is reported too)")


@dataclass
class PipelineConfig:
    """The three stages in one go on one machine."""

    parallel_jobs: int = 1
    """Stages I shards, label methods and RL arms run at the same time."""
    label_methods: list[str] = field(default_factory=lambda: list(LABEL_METHODS))
    rewards: list[str] = field(default_factory=lambda: ["process_aware"])
    rl_answers: str | None = None
    """Answer keys, handed to the rlvr arm only."""

    def __post_init__(self) -> None:
        at_least("pipeline.parallel_jobs", self.parallel_jobs, 1)
        for method in self.label_methods:
            one_of("pipeline.label_methods", method, set(LABEL_METHODS))
        for reward in self.rewards:
            one_of("pipeline.rewards", reward, {"process_aware", "rlvr"})
        for name in ("label_methods", "rewards"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ConfigError(f"pipeline.{name}={getattr(self, name)}: name each only once")
        if self.rl_answers is not None and "rlvr" not in self.rewards:
            raise without_effect("pipeline.rl_answers", self.rl_answers, "without rlvr in pipeline.rewards")


@dataclass
class SparkConfig:
    """The whole configuration; every subcommand reads the same tree."""

    run: RunConfig = field(default_factory=RunConfig)
    models: ModelsConfig = field(default_factory=ModelsConfig)
    data: DataConfig = field(default_factory=DataConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    megatron: MegatronConfig = field(default_factory=MegatronConfig)
    stage1: Stage1Config = field(default_factory=Stage1Config)
    stage2: Stage2Config = field(default_factory=Stage2Config)
    rl: RLConfig = field(default_factory=RLConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)

    def __post_init__(self) -> None:
        if self.data.rl_answers is not None and self.rl.reward != "rlvr":
            raise without_effect("data.rl_answers", self.data.rl_answers, f"with rl.reward={self.rl.reward}")
