"""Memory of every pipeline stage's ranks, component by component."""

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
    """Work of one data-parallel rank in one optimizer step."""

    tokens: int
    """Tokens of the largest micro-batch: ``megatron.tokens_per_micro_batch``, or one longer
    sequence.
    """
    micro_batches: int

    def __post_init__(self) -> None:
        at_least("tokens per micro-batch", self.tokens, 1)
        at_least("micro-batches per step", self.micro_batches, 1)


@dataclass(frozen=True)
class RankMemory:
    """Memory of one rank of a pipeline stage, in bytes on its device unless noted."""

    stage: int
    num_parameters: int
    states: StateBytes
    activations: ActivationBytes
    in_flight: int
    """Micro-batches whose activations are alive at the same time."""
    sync: int
    """Held by a weight sync in addition to the model. Nothing of a training step is alive then."""
    snapshot: int
    """Host memory of the reference weights for a KL term, and of the current ones while the
    reference is loaded.
    """

    @property
    def graphs(self) -> int:
        """Activations of all micro-batches in flight, and of a layer that is recomputed."""
        return self.activations.graphs(self.in_flight)

    @property
    def transient(self) -> int:
        """Short-lived memory in addition to ``graphs``: logits, or gradients inside a layer."""
        return self.activations.peak(self.in_flight) - self.graphs

    @property
    def peak(self) -> int:
        """Most that this rank allocates at once, without framework and fragmentation."""
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
    """Return the memory of a rank of each pipeline stage, training with AdamW.

    ``sync_bytes`` is the most that a weight sync holds on any rank. Raises ``ConfigError`` when the
    model cannot be split by ``layout``.
    """
    spec.check_layout(layout)
    num_stages = layout.pipeline_parallel
    stages = []
    for stage, parameters in enumerate(stage_parameters(spec, layout)):
        activations = activation_bytes(
            spec,
            layout,
            batch.tokens,
            first=stage == 0,
            last=stage == num_stages - 1,
            transformer_engine=transformer_engine,
        )
        shares_embeddings = spec.tied_embeddings and num_stages > 1
        stages.append(
            RankMemory(
                stage=stage,
                num_parameters=parameters.num_elements,
                states=state_bytes(parameters, layout, shares_embeddings),
                activations=activations,
                # 1F1B schedule (Narayanan et al., 2021, arXiv:2104.04473).
                in_flight=min(num_stages - stage, batch.micro_batches),
                sync=sync_bytes,
                snapshot=snapshots * weight_bytes(parameters, layout.dtype),
            )
        )
    return stages


def worst_rank(stages: list[RankMemory]) -> RankMemory:
    """Return the stage whose ranks have the highest peak."""
    return max(stages, key=lambda rank: rank.peak)
