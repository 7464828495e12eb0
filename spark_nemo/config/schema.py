"""Every setting of the package and its default; ``conf/`` only holds what an experiment changes.

A value that no code would read under the chosen options raises ``ConfigError``. Such settings
default to None ("not set"), which distinguishes a set value from a default. Nothing here imports
torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .designs import designs, reads_answer_keys, variant_suffix
from .engine import EngineConfig, check_cuts
from .errors import ConfigError, at_least, check_finite, one_of, without_effect
from .labels import LABEL_METHODS, REFERENCE_GUIDED, REVISED_METHODS, VOTE_METHODS, LabelsConfig
from .reward import VARIANTS, ModelReward
from .rl import RLConfig
from .sft import SftConfig
from .trainer import MegatronConfig
from .verification import Stage1Config, Stage2Config
from .weight_sync import WeightSyncConfig


@dataclass
class RunConfig:
    """Run folder and seed."""

    dir: str = "runs/default"
    """Run folder, which all stages of an experiment share."""
    seed: int = 0
    """Seed of all sampling and shuffling."""

    def __post_init__(self) -> None:
        if not self.dir:
            raise ConfigError("run.dir is empty: name a folder for the results")


@dataclass
class ModelsConfig:
    """Hugging Face model folders (config.json, safetensors, tokenizer).

    ``toy:generator``, ``toy:verifier`` and ``toy:critic`` are the shipped models of the toy task.
    """

    generator: str = ""
    """Model that samples stage I's solutions."""
    verifier: str = ""
    """Model that writes stage I's verifications."""
    critic: str | None = None
    """Model for critiques and merges (stage1.meta_critique), and for verifications that read the
    answer (stage1.reference_answers). None is models.verifier.
    """
    reward_base: str = ""
    """Model that stage II fine-tunes into the reward model."""
    policy: str = ""
    """Initial policy of stage III."""
    policy_base: str | None = None
    """Model that ``spark-nemo sft`` fine-tunes on the policy's format. models.policy is then its
    output folder, ``RUN/sft/model``.
    """


@dataclass
class DataConfig:
    """Problem files: JSONL with ``problem_id`` and ``question``, or ``toy:SPLIT:COUNT``."""

    stage1_problems: str = ""
    """Problems of stage I."""
    rl_problems: str = ""
    """Training problems of stage III."""
    eval_problems: str = ""
    """Held-out problems with answers, read by evaluation only."""
    rl_answers: str | None = None
    """Answer keys of ``rl_problems``. Allowed only with a reward that declares to read them, such
    as ``rl/reward=rlvr``.
    """
    processbench: str = ""
    """ProcessBench cases for the evaluation of reward models."""
    sft_examples: str = ""
    """Responses in the policy's format (JSONL with ``problem_id``, ``question`` and ``response``);
    read by sft only.
    """


@dataclass
class EvaluationConfig:
    """Held-out evaluation. Answer keys are read here and nowhere else."""

    samples_per_problem: int = 4
    """Number of sampled responses per problem, in addition to the greedy response."""
    temperature: float = 1.0
    """Temperature of the sampled responses."""
    max_new_tokens: int = 2048
    """Maximum tokens of a response."""
    bootstrap_samples: int = 2000
    """Number of bootstrap resamples for the confidence intervals."""
    top_p: float | None = None
    """top_p of the sampled responses; None is 1."""
    top_k: int | None = None
    """top_k of the sampled responses; None is all tokens."""

    def __post_init__(self) -> None:
        check_cuts("evaluation", self.top_p, self.top_k)
        for name in ("samples_per_problem", "max_new_tokens", "bootstrap_samples"):
            at_least(f"evaluation.{name}", getattr(self, name), 1)
        if self.temperature <= 0:
            raise ConfigError(
                f"evaluation.temperature={self.temperature}: "
                "must be positive (greedy is reported too)"
            )


@dataclass
class PipelineConfig:
    """All three stages by one command on one machine."""

    parallel_jobs: int | str = "auto"
    """Maximum jobs at the same time: shards of stage I, reward models, RL variants. auto is one per
    CPU core, at most 8; it is 1 if jobs would share GPUs or launch servers.
    """
    label_methods: list[str] = field(default_factory=lambda: list(VOTE_METHODS))
    """Label methods, each with a reward model of its own."""
    rounds: int = 1
    """Number of rounds of stages I and II. From round 2 on, the previous reward model verifies the
    same solutions again, and ``stage2.method`` makes new labels from its votes. Stage III uses the
    last round's reward model.
    """
    rewards: list[str] = field(default_factory=lambda: ["process_aware"])
    """Reward designs, each with an RL run: options of rl/reward, or of rl/advantage (on
    process_aware).
    """
    variants: list[str] = field(default_factory=list)
    """Kinds of reward model to train on the labels of stage2.method. Every design that queries a
    reward model gets an RL variant with each kind; an orm only where no step labels are needed.
    Empty is stage2.variant alone.
    """
    rl_answers: str | None = None
    """Answer keys for the rlvr variant only."""

    def __post_init__(self) -> None:
        if isinstance(self.parallel_jobs, str):
            one_of("pipeline.parallel_jobs", self.parallel_jobs, {"auto"})
        else:
            at_least("pipeline.parallel_jobs", self.parallel_jobs, 1)
        at_least("pipeline.rounds", self.rounds, 1)
        for method in self.label_methods:
            one_of("pipeline.label_methods", method, set(LABEL_METHODS))
        for reward in self.rewards:
            one_of("pipeline.rewards", reward, designs())
        for variant in self.variants:
            one_of("pipeline.variants", variant, VARIANTS)
        if self.variants and not self.label_methods:
            raise without_effect(
                "pipeline.variants", self.variants, "with pipeline.label_methods=[]"
            )
        for name in ("label_methods", "rewards", "variants"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ConfigError(f"pipeline.{name}={getattr(self, name)}: name each only once")
        if self.rl_answers is not None and not any(map(reads_answer_keys, self.rewards)):
            raise without_effect(
                "pipeline.rl_answers",
                self.rl_answers,
                "without a design in pipeline.rewards that reads answer keys, such as rlvr",
            )


@dataclass
class SparkConfig:
    """Complete configuration; every subcommand reads the same tree."""

    plugins: list[str] = field(default_factory=list)
    """Modules of your own that register rewards or advantages, imported from the current folder."""

    run: RunConfig = field(default_factory=RunConfig)
    models: ModelsConfig = field(default_factory=ModelsConfig)
    data: DataConfig = field(default_factory=DataConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    megatron: MegatronConfig = field(default_factory=MegatronConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    stage1: Stage1Config = field(default_factory=Stage1Config)
    labels: LabelsConfig = field(default_factory=LabelsConfig)
    stage2: Stage2Config = field(default_factory=Stage2Config)
    rl: RLConfig = field(default_factory=RLConfig)
    weight_sync: WeightSyncConfig = field(default_factory=WeightSyncConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)

    def __post_init__(self) -> None:
        check_finite(self)
        several_jobs = self.pipeline.parallel_jobs not in ("auto", 1)
        if several_jobs and self.engine.launches_servers:
            raise ConfigError(
                f"pipeline.parallel_jobs={self.pipeline.parallel_jobs} with launched servers: each "
                "job would launch its own on the same devices; set 1, or name running servers by "
                "urls"
            )
        if self.data.rl_answers is not None and not reads_answer_keys(self.rl.design):
            raise without_effect(
                "data.rl_answers", self.data.rl_answers, f"with rl/reward={self.rl.reward.name}"
            )
        self._check_variants()
        if self.pipeline.rounds > 1 and self.stage2.variant != "prm_cot":
            raise ConfigError(
                f"pipeline.rounds={self.pipeline.rounds}: a later round needs verifications as a "
                f"prm_cot writes them, stage2.variant is {self.stage2.variant}"
            )
        if self.pipeline.rounds > 1 and self.stage2.method not in self.pipeline.label_methods:
            raise ConfigError(
                f"pipeline.rounds={self.pipeline.rounds} verifies with the reward model of "
                f"stage2.method={self.stage2.method}: add it to pipeline.label_methods"
            )
        self.weight_sync.check_engine(self.engine.kind)
        self._check_label_methods()

    @property
    def reward_variant(self) -> str | None:
        """Kind of the reward model that stage III queries; None for a baseline."""
        reward = self.rl.reward
        if not isinstance(reward, ModelReward):
            return None
        return self.stage2.variant if reward.variant == "auto" else reward.variant

    @property
    def rl_variant(self) -> str:
        """Name of stage III's folder: the design, and the reward model's kind unless PRM-CoT."""
        return f"{self.rl.design}{variant_suffix(self.reward_variant)}"

    @property
    def reward_models(self) -> list[str]:
        """``pipeline.variants``, or ``stage2.variant`` if it is empty."""
        return self.pipeline.variants or [self.stage2.variant]

    def _check_variants(self) -> None:
        variants = self.pipeline.variants
        if not variants:
            return
        # A stage II job of the pipeline gets stage2.variant on top of the same settings.
        if self.stage2.variant not in variants:
            raise ConfigError(
                f"pipeline.variants={variants}: add stage2.variant={self.stage2.variant}, which "
                "every other label method is trained in, or change that"
            )
        if self.pipeline.rounds > 1 and variants != ["prm_cot"]:
            raise ConfigError(
                f"pipeline.rounds={self.pipeline.rounds}: only a prm_cot writes verifications that "
                f"a later round can learn from, pipeline.variants is {variants}"
            )

    def _check_label_methods(self) -> None:
        """Check that stage I produces what the label methods read, and nothing else."""
        for method in self.pipeline.label_methods:
            pick = REVISED_METHODS.get(method)
            if pick is not None and pick not in self.stage1.meta_critique:
                raise ConfigError(
                    f"pipeline.label_methods has {method}: add {pick} to stage1.meta_critique"
                )
            if method == REFERENCE_GUIDED and self.stage1.reference_answers is None:
                raise ConfigError(
                    f"pipeline.label_methods has {method}, a baseline that reads answer keys: set "
                    "stage1.reference_answers (JSONL with problem_id and answer)"
                )
        self._check_label_rules()
        if REFERENCE_GUIDED not in (self.stage2.method, *self.pipeline.label_methods):
            for name, value in (
                ("stage1.reference_answers", self.stage1.reference_answers),
                ("labels.reference_pick", self.labels.reference_pick),
            ):
                if value is not None:
                    raise without_effect(
                        name,
                        value,
                        "where neither stage2.method nor pipeline.label_methods has "
                        f"{REFERENCE_GUIDED}",
                    )

    def _check_label_rules(self) -> None:
        """Raise ``ConfigError`` for a rule of ``labels`` that no chosen label method reads."""
        methods = {self.stage2.method, *self.pipeline.label_methods}
        picks = {REVISED_METHODS.get(method, method) for method in methods} | set(
            self.stage1.meta_critique
        )
        if REFERENCE_GUIDED in methods:
            picks.add(self.labels.reference_pick or "step_consistency")
        by_steps = "step_consistency" in picks
        read = {
            "ties": by_steps or "outcome_consistency" in picks,
            "no_match": by_steps,
            "require_consistent_verdict": by_steps or not methods.isdisjoint(REVISED_METHODS),
        }
        for name, default in (
            ("ties", "drop"),
            ("no_match", "drop"),
            ("require_consistent_verdict", True),
        ):
            if (value := getattr(self.labels, name)) != default and not read[name]:
                raise without_effect(
                    f"labels.{name}",
                    value,
                    "with these label methods (stage2.method, pipeline.label_methods)",
                )
