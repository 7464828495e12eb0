"""Every setting of the system and its default. ``conf/`` only says what an experiment changes.

A value that nothing would read under the chosen options raises ``ConfigError``: such knobs default
to None ("not set") so that a set value can be told from a default. Nothing here imports torch.
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
    """Where results go and what makes a run reproducible."""

    dir: str = "runs/default"
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.dir:
            raise ConfigError("run.dir is empty: name a folder for the results")


@dataclass
class ModelsConfig:
    """Hugging Face model folders (config.json, safetensors, tokenizer).

    ``toy:generator``, ``toy:verifier`` and ``toy:critic`` name the small world's shipped models.
    """

    generator: str = ""
    verifier: str = ""
    critic: str | None = None
    """Writes critiques and merges (stage1.meta_critique), and the verifications that see the answer
    (stage1.reference_answers). None is the verifier itself."""
    reward_base: str = ""
    """What stage II fine-tunes."""
    policy: str = ""
    """Where stage III starts."""
    policy_base: str | None = None
    """What ``spark-nemo sft`` teaches the policy's format; models.policy is then the folder it
    writes, ``RUN/sft/model``.
    """


@dataclass
class DataConfig:
    """Problem files (JSONL with ``problem_id`` and ``question``), or ``toy:SPLIT:COUNT`` for the
    small world's.
    """

    stage1_problems: str = ""
    rl_problems: str = ""
    eval_problems: str = ""
    """With answers; read by evaluation only (and by the RLVR baseline through ``rl_answers``)."""
    rl_answers: str | None = None
    """Answer keys of ``rl_problems``: allowed only with a reward that declares to read them, such as
    ``rl/reward=rlvr``.
    """
    processbench: str = ""
    sft_examples: str = ""
    """Responses in the policy's format (JSONL with ``problem_id``, ``question`` and ``response``);
    read by sft only.
    """


@dataclass
class EvaluationConfig:
    """Held-out evaluation. Answer keys are read here and nowhere else."""

    samples_per_problem: int = 4
    temperature: float = 1.0
    max_new_tokens: int = 2048
    bootstrap_samples: int = 2000
    top_p: float | None = None
    """Of the samples, not of the greedy completion; None is 1."""
    top_k: int | None = None
    """Of the samples; None is all tokens."""

    def __post_init__(self) -> None:
        check_cuts("evaluation", self.top_p, self.top_k)
        for name in ("samples_per_problem", "max_new_tokens", "bootstrap_samples"):
            at_least(f"evaluation.{name}", getattr(self, name), 1)
        if self.temperature <= 0:
            raise ConfigError(
                f"evaluation.temperature={self.temperature}: must be positive (greedy is reported too)"
            )


@dataclass
class PipelineConfig:
    """The three stages in one go on one machine."""

    parallel_jobs: int | str = "auto"
    """Jobs that run at the same time: shards of stage I, reward models, RL variants. auto is one per
    CPU core, at most 8; it is 1 where jobs would share GPUs or launch servers.
    """
    label_methods: list[str] = field(default_factory=lambda: list(VOTE_METHODS))
    rounds: int = 1
    """From round 2 on the reward model of the round before verifies, and the labels of
    ``stage2.method`` are made anew from its votes on the same solutions; the last round's reward
    model is stage III's.
    """
    rewards: list[str] = field(default_factory=lambda: ["process_aware"])
    """Reward designs, an RL run for each: an option of rl/reward, or of rl/advantage (on
    process_aware).
    """
    variants: list[str] = field(default_factory=list)
    """Kinds of reward model that stage2.method's labels train, with an arm of stage III for every
    design that asks one and each of them; an orm gets the designs that need no step labels. Empty
    is stage2.variant alone.
    """
    rl_answers: str | None = None
    """Answer keys, handed to the rlvr arm only."""

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
    """The whole configuration; every subcommand reads the same tree."""

    plugins: list[str] = field(default_factory=list)
    """Modules that register rewards or advantages of your own, by import path from the current
    folder.
    """

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
                f"pipeline.parallel_jobs={self.pipeline.parallel_jobs} with launched servers: each job "
                "would launch its own on the same devices; set 1, or name running servers by urls"
            )
        if self.data.rl_answers is not None and not reads_answer_keys(self.rl.design):
            raise without_effect(
                "data.rl_answers", self.data.rl_answers, f"with rl/reward={self.rl.reward.name}"
            )
        self._check_variants()
        if self.pipeline.rounds > 1 and self.stage2.variant != "prm_cot":
            raise ConfigError(
                f"pipeline.rounds={self.pipeline.rounds}: a later round needs verifications as a prm_cot "
                f"writes them, stage2.variant is {self.stage2.variant}"
            )
        if self.pipeline.rounds > 1 and self.stage2.method not in self.pipeline.label_methods:
            raise ConfigError(
                f"pipeline.rounds={self.pipeline.rounds} verifies with the reward model of stage2.method="
                f"{self.stage2.method}: add it to pipeline.label_methods"
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
        """The name of stage III's folder: the design, and the variant where it is not a PRM-CoT."""
        return f"{self.rl.design}{variant_suffix(self.reward_variant)}"

    @property
    def reward_models(self) -> list[str]:
        """``pipeline.variants``, resolved."""
        return self.pipeline.variants or [self.stage2.variant]

    def _check_variants(self) -> None:
        variants = self.pipeline.variants
        if not variants:
            return
        # A stage II job of the pipeline gets stage2.variant on top of the same settings.
        if self.stage2.variant not in variants:
            raise ConfigError(
                f"pipeline.variants={variants}: add stage2.variant={self.stage2.variant}, which every "
                "other label method is trained in, or change that"
            )
        if self.pipeline.rounds > 1 and variants != ["prm_cot"]:
            raise ConfigError(
                f"pipeline.rounds={self.pipeline.rounds}: only a prm_cot writes verifications that a "
                f"later round can learn from, pipeline.variants is {variants}"
            )

    def _check_label_methods(self) -> None:
        """What the label methods need of stage I, and what only they read."""
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
                        f"where neither stage2.method nor pipeline.label_methods has {REFERENCE_GUIDED}",
                    )

    def _check_label_rules(self) -> None:
        """Rules that no label method asked for reads."""
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
