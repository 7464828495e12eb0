"""The memory of every pipeline stage's ranks, component by component."""

from __future__ import annotations

from dataclasses import dataclass

from spark_nemo.config import MegatronConfig
from spark_nemo.config.errors import at_least
from spark_nemo.models.spec import ModelSpec

from .activations import ActivationBytes, activation_bytes
from .parameters import stage_parameters
from .states import StateBytes, state_bytes, weight_bytes


@dataclass(frozen=True)
class TrainBatch:
    """What one optimizer step puts through one data-parallel rank."""

    tokens: int
    """Of the largest micro-batch: ``megatron.tokens_per_micro_batch``, or one sequence that is
    longer.
    """
    micro_batches: int

    def __post_init__(self) -> None:
        at_least("tokens per micro-batch", self.tokens, 1)
        at_least("micro-batches per step", self.micro_batches, 1)


@dataclass(frozen=True)
class RankMemory:
    """One rank of a pipeline stage; bytes on its device unless said otherwise."""

    stage: int
    num_parameters: int
    states: StateBytes
    activations: ActivationBytes
    in_flight: int
    """Micro-batches whose activations are alive together."""
    sync: int
    """What a weight sync holds besides the model; nothing of a training step is alive then."""
    snapshot: int
    """In host memory: the reference weights for a KL term, and the current ones put aside while
    they are used.
    """

    @property
    def graphs(self) -> int:
        """Activations of all micro-batches in flight, and of a layer that is recomputed."""
        return self.activations.graphs(self.in_flight)

    @property
    def passing(self) -> int:
        """What comes and goes beside ``graphs``: the loss's logits, or gradients inside a layer."""
        return self.activations.peak(self.in_flight) - self.graphs

    @property
    def peak(self) -> int:
        """The most this rank allocates at once. Framework and fragmentation are not in it."""
        return self.states.total + max(
            self.activations.peak(self.in_flight), self.sync, self.states.gradient_copies
        )


def rank_memory(
    spec: ModelSpec,
    layout: MegatronConfig,
    batch: TrainBatch,
    *,
    transformer_engine: bool,
    sync_bytes: int = 0,
    snapshots: int = 0,
) -> list[RankMemory]:
    """The memory of a rank of each pipeline stage, training with AdamW.

    In the 1F1B schedule stage p of P keeps min(P - p, micro-batches) of them in flight (Narayanan
    et al., 2021, arXiv:2104.04473). ``sync_bytes`` is the most a weight sync holds on any rank.
    Raises ``ConfigError`` when the model cannot be split as ``layout`` says.
    """
    spec.check_layout(layout)
    stages, depth = [], layout.pipeline_parallel
    for stage, parameters in enumerate(stage_parameters(spec, layout)):
        activations = activation_bytes(
            spec,
            layout,
            batch.tokens,
            first=stage == 0,
            last=stage == depth - 1,
            transformer_engine=transformer_engine,
        )
        stages.append(
            RankMemory(
                stage,
                parameters.num_elements,
                state_bytes(parameters, layout, spec.tied_embeddings and depth > 1),
                activations,
                min(depth - stage, batch.micro_batches),
                sync_bytes,
                snapshots * weight_bytes(parameters, layout.dtype),
            )
        )
    return stages


def worst_rank(stages: list[RankMemory]) -> RankMemory:
    """The stage whose ranks need most."""
    return max(stages, key=lambda rank: rank.peak)
