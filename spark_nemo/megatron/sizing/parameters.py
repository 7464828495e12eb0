"""Which parameters every rank holds, from the table that also loads and exports them
(``hf_weights``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from spark_nemo.config import MegatronConfig
from spark_nemo.megatron.families import Rule
from spark_nemo.megatron.hf_weights import placed_rules
from spark_nemo.megatron.model_shape import ModelShape

Shapes = dict[str, tuple[int, ...]]
"""Megatron's parameter names and the shapes of one rank's shards."""


@dataclass(frozen=True)
class StageParameters:
    """One rank of a pipeline stage; its ranks differ in their slices only. Names are the first of a
    rule's.
    """

    dense: Shapes = field(default_factory=dict)
    """What every data-parallel replica has."""
    experts: Shapes = field(default_factory=dict)
    """What the expert-parallel ranks share out."""

    @property
    def all(self) -> Shapes:
        """Both."""
        return {**self.dense, **self.experts}

    @property
    def num_elements(self) -> int:
        """Elements of all of them."""
        return sum(math.prod(size) for size in self.all.values())


def stage_parameters(shape: ModelShape, layout: MegatronConfig) -> list[StageParameters]:
    """The parameters of a rank of each pipeline stage.

    The rules' own transforms are run on the meta device, so fused rows, padded vocabularies and the
    last stage's copy of tied embeddings are counted as they are made. No weight is allocated.
    """
    stages = [StageParameters() for _ in range(layout.pipeline_parallel)]
    shards: dict[int, tuple[Rule, tuple[int, ...]]] = {}
    for placed in placed_rules(shape, layout.pipeline_parallel, layout.expert_parallel):
        if placed.expert_rank not in (None, 0):
            continue
        if id(placed.rule) not in shards:
            tensors = [torch.empty(size, device="meta") for size in placed.hf.values()]
            parts = (
                1 if placed.rule.per_expert else layout.tensor_parallel
            )  # an expert is never cut
            cut = placed.rule.transform.to_shards(tensors, shape, parts)
            shards[id(placed.rule)] = (
                placed.rule,
                tuple(cut[0].shape),
            )  # the rule too: its id must stay taken
        stage = stages[placed.stage]
        (stage.experts if placed.rule.per_expert else stage.dense)[placed.megatron[0]] = shards[
            id(placed.rule)
        ][1]
    return stages
