"""Stages I and II: verification data, and the reward model trained on it."""

from __future__ import annotations

from dataclasses import dataclass, field

from .engine import SamplingConfig
from .errors import ConfigError, at_least, in_unit_interval, one_of, without_effect
from .labels import LABEL_METHODS, VOTE_METHODS
from .sft import FineTuningConfig


@dataclass
class RevisionSamplingConfig:
    """How critiques and merges are drawn; None is not set."""

    temperature: float | None = None
    """None is 0, greedy."""
    top_p: float | None = None
    """None is 1; without effect when greedy."""
    max_new_tokens: int | None = None
    """None is 8,192, for a critique and for a merge."""
    top_k: int | None = None
    """None is all tokens; without effect when greedy."""


@dataclass
class Stage1Config:
    """Verification data: M solutions per problem, N verifications per solution."""

    solutions_per_problem: int = 8
    verifications_per_solution: int = 16
    prompt_set: str = "paper"
    verifier_prompt: str = "verify"
    """What the verifier is asked with: verify (a general model) or reward_model (a PRM-CoT of an
    earlier round).
    """
    reuse_solutions_from: str | None = None
    """Store of an earlier run whose solutions are taken over where they are the ones this run would
    sample.
    """
    generator_sampling: SamplingConfig = field(
        default_factory=lambda: SamplingConfig(temperature=0.7, top_p=0.95, max_new_tokens=8192)
    )
    verifier_sampling: SamplingConfig = field(
        default_factory=lambda: SamplingConfig(temperature=0.8, top_p=0.95, max_new_tokens=8192)
    )
    num_shards: int = 1
    shard: int | None = None
    """Work on problems with index % num_shards == shard only (a Slurm array task); None does all.
    """
    max_failure_rate: float = 0.5
    """Stop when more than this share of solutions or verifications is unusable."""
    meta_critique: list[str] = field(default_factory=list)
    """Which verification of a solution gets a critique and a merge: the one picked by single (for
    meta_critique), by outcome_consistency (hybrid_outcome) or by step_consistency (hybrid_step).
    """
    revision_sampling: RevisionSamplingConfig = field(default_factory=RevisionSamplingConfig)
    """Of critiques and merges; only read with meta_critique."""
    reference_answers: str | None = None
    """Answer keys of data.stage1_problems, shown to the verifier for the labels of
    reference_guided: a declared baseline. Legal only where that method is asked for.
    """
    reference_verifications: int | None = None
    """Verifications per solution that see the answer. None is 8, as in the authors' script."""
    max_requests_in_flight: int | None = None
    """Solutions and verifications asked for at the same time; None is twice what the engine decodes
    together.
    """
    early_stop: str = "none"
    """When to stop asking for votes on a solution: ``none``, ``exact`` or ``sequential``; see
    ``verification.early_stop``."""
    early_stop_error: float | None = None
    """Of the sequential test: probability that a step's majority would be another one after all
    votes.
    """
    early_stop_verdict: bool = False
    """The majority of the final Yes/No must be decided too, not the steps' only; costs about five
    points of the saving on the small world. For outcome consistency, which rests on it.
    """
    vote_batch_size: int | None = None
    """Least number of votes on a solution asked for together under early_stop; None is 1, which
    costs fewest votes.
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
                f"stage1.shard={self.shard}: must lie in 0..{self.num_shards - 1} (stage1.num_shards)"
            )
        if self.max_requests_in_flight is not None:
            at_least("stage1.max_requests_in_flight", self.max_requests_in_flight, 1)
        self._check_early_stop()
        self._check_extras()

    @property
    def revised_with(self) -> SamplingConfig:
        """``revision_sampling``, resolved."""
        given = {
            name: value for name, value in vars(self.revision_sampling).items() if value is not None
        }
        return SamplingConfig(**{"temperature": 0.0, "max_new_tokens": 8192, **given})

    @property
    def num_reference_verifications(self) -> int:
        """``reference_verifications``, resolved."""
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
            _ = self.revised_with  # refuses illegal values
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
    variant: str = "prm_cot"
    max_length: int = 8192
    save_every: int = 50
    eval_sampling: SamplingConfig = field(
        default_factory=lambda: SamplingConfig(temperature=0.0, max_new_tokens=4096)
    )

    def __post_init__(self) -> None:
        one_of("stage2.method", self.method, set(LABEL_METHODS))
        one_of("stage2.variant", self.variant, {"orm", "prm", "prm_cot"})
        self.check_bounds("stage2")
