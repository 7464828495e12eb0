"""Settings of stages I and II: verification data, and the reward model trained on it."""

from __future__ import annotations

from dataclasses import dataclass, field

from .engine import SamplingConfig
from .errors import ConfigError, at_least, in_unit_interval, one_of, without_effect
from .labels import LABEL_METHODS, VOTE_METHODS
from .sft import FineTuningConfig


@dataclass
class RevisionSamplingConfig:
    """Sampling parameters of critiques and merges; None is not set."""

    temperature: float | None = None
    """Sampling temperature; None is 0, greedy."""
    top_p: float | None = None
    """Nucleus sampling; None is 1. Invalid when greedy."""
    max_new_tokens: int | None = None
    """Maximum tokens of a critique, and of a merge; None is 8,192."""
    top_k: int | None = None
    """Draw from the k most probable tokens only; None is all tokens. Invalid when greedy."""


@dataclass
class Stage1Config:
    """Verification data: M solutions per problem, N verifications per solution."""

    solutions_per_problem: int = 8
    """Number of sampled solutions per problem."""
    verifications_per_solution: int = 16
    """Number of verifications (votes) per solution."""
    prompt_set: str = "paper"
    """Wording of the prompts: ``paper``, or ``compact`` for the toy task's models."""
    verifier_prompt: str = "verify"
    """Prompt of the verifier: ``verify`` for a general model, ``reward_model`` for a PRM-CoT of an
    earlier round.
    """
    reuse_solutions_from: str | None = None
    """Store of an earlier run. Its solutions are reused if this run would sample the same ones."""
    generator_sampling: SamplingConfig = field(
        default_factory=lambda: SamplingConfig(temperature=0.7, top_p=0.95, max_new_tokens=8192)
    )
    """Sampling of the solutions."""
    verifier_sampling: SamplingConfig = field(
        default_factory=lambda: SamplingConfig(temperature=0.8, top_p=0.95, max_new_tokens=8192)
    )
    """Sampling of the verifications."""
    num_shards: int = 1
    """Number of shards the problems are divided into, one per job."""
    shard: int | None = None
    """Process only problems with index % num_shards == shard (a Slurm array task). None processes
    all problems.
    """
    max_failure_rate: float = 0.5
    """Stop when a larger share of the solutions or of the verifications is unusable."""
    meta_critique: list[str] = field(default_factory=list)
    """Vote methods that choose a verification to critique and merge: single (for meta_critique),
    outcome_consistency (hybrid_outcome), step_consistency (hybrid_step).
    """
    revision_sampling: RevisionSamplingConfig = field(default_factory=RevisionSamplingConfig)
    """Sampling of critiques and merges; invalid without meta_critique."""
    reference_answers: str | None = None
    """Answer keys of data.stage1_problems, shown to the verifier for reference_guided labels, a
    declared baseline. Invalid without that method.
    """
    reference_verifications: int | None = None
    """Number of verifications per solution that read the answer. None is 8, as in the authors'
    script.
    """
    max_requests_in_flight: int | None = None
    """Maximum solutions and verifications requested at the same time. None is twice the number that
    the engine decodes together.
    """
    early_stop: str = "none"
    """Rule that ends voting on a solution early: ``none``, ``exact`` or ``sequential``; see
    ``verification.early_stop``.
    """
    early_stop_error: float | None = None
    """Sequential rule: accepted probability that all votes would have changed a step's majority."""
    early_stop_verdict: bool = False
    """Continue until the majority on the final Yes/No is decided too, as outcome_consistency needs.
    Costs about five points of the saving on the toy task.
    """
    vote_batch_size: int | None = None
    """Minimum votes on a solution requested together under early_stop. None is 1, which needs the
    fewest votes.
    """

    def __post_init__(self) -> None:
        at_least("stage1.solutions_per_problem", self.solutions_per_problem, 1)
        at_least("stage1.verifications_per_solution", self.verifications_per_solution, 1)
        at_least("stage1.num_shards", self.num_shards, 1)
        in_unit_interval("stage1.max_failure_rate", self.max_failure_rate)
        one_of("stage1.prompt_set", self.prompt_set, {"paper", "compact"})
        one_of("stage1.verifier_prompt", self.verifier_prompt, {"verify", "reward_model"})
        if self.shard is None and self.num_shards > 1:
            raise without_effect("stage1.num_shards", self.num_shards, "without stage1.shard")
        if self.shard is not None and not 0 <= self.shard < self.num_shards:
            raise ConfigError(
                f"stage1.shard={self.shard}: must lie in 0..{self.num_shards - 1} "
                "(stage1.num_shards)"
            )
        if self.max_requests_in_flight is not None:
            at_least("stage1.max_requests_in_flight", self.max_requests_in_flight, 1)
        self._check_early_stop()
        self._check_extras()

    @property
    def revised_with(self) -> SamplingConfig:
        """``revision_sampling`` with defaults for what is not set."""
        given = {
            name: value for name, value in vars(self.revision_sampling).items() if value is not None
        }
        return SamplingConfig(**{"temperature": 0.0, "max_new_tokens": 8192, **given})

    @property
    def num_reference_verifications(self) -> int:
        """``reference_verifications``, or its default if it is not set."""
        return self.reference_verifications or 8

    def _check_extras(self) -> None:
        for pick in self.meta_critique:
            one_of("stage1.meta_critique", pick, VOTE_METHODS)
        if len(set(self.meta_critique)) < len(self.meta_critique):
            raise ConfigError(f"stage1.meta_critique={self.meta_critique}: name each only once")
        for name, value in vars(self.revision_sampling).items():
            if value is not None and not self.meta_critique:
                raise without_effect(
                    f"stage1.revision_sampling.{name}", value, "with stage1.meta_critique=[]"
                )
        if self.meta_critique:
            _ = self.revised_with  # raises ConfigError for invalid values
        if self.reference_verifications is not None:
            at_least("stage1.reference_verifications", self.reference_verifications, 1)
            if self.reference_answers is None:
                raise without_effect(
                    "stage1.reference_verifications",
                    self.reference_verifications,
                    "without stage1.reference_answers",
                )

    def _check_early_stop(self) -> None:
        one_of("stage1.early_stop", self.early_stop, {"none", "exact", "sequential"})
        if self.early_stop == "sequential":
            if self.early_stop_error is None:
                raise ConfigError(
                    "stage1.early_stop=sequential needs stage1.early_stop_error, 0.05 for example"
                )
            if not 0 < self.early_stop_error < 0.5:
                raise ConfigError(
                    f"stage1.early_stop_error={self.early_stop_error}: must lie between 0 and 0.5"
                )
        elif self.early_stop_error is not None:
            raise without_effect(
                "stage1.early_stop_error",
                self.early_stop_error,
                f"with stage1.early_stop={self.early_stop}",
            )
        least = {"none": 1, "exact": 3, "sequential": 2}[self.early_stop]
        if self.verifications_per_solution < least:
            raise without_effect(
                "stage1.early_stop",
                self.early_stop,
                f"with fewer than {least} votes "
                f"(stage1.verifications_per_solution={self.verifications_per_solution})",
            )
        if self.vote_batch_size is not None:
            at_least("stage1.vote_batch_size", self.vote_batch_size, 1)
        for name, value in (
            ("vote_batch_size", self.vote_batch_size),
            ("early_stop_verdict", self.early_stop_verdict or None),
        ):
            if value is not None and self.early_stop == "none":
                raise without_effect(f"stage1.{name}", value, "with stage1.early_stop=none")


@dataclass
class Stage2Config(FineTuningConfig):
    """Fine-tuning of the generative reward model on stage I labels."""

    method: str = "step_consistency"
    """Label method that the reward model is trained on."""
    variant: str = "prm_cot"
    """Kind of the reward model: ``prm_cot``, ``prm`` or ``orm``."""
    max_length: int = 8192
    save_every: int = 50
    eval_sampling: SamplingConfig = field(
        default_factory=lambda: SamplingConfig(temperature=0.0, max_new_tokens=4096)
    )
    """Sampling of the verifications in the reward model's evaluation."""

    def __post_init__(self) -> None:
        one_of("stage2.method", self.method, set(LABEL_METHODS))
        one_of("stage2.variant", self.variant, {"orm", "prm", "prm_cot"})
        self.check_bounds("stage2")
