"""Parameters that every rank holds, from the mapping that also loads and exports them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from spark_nemo.config import MegatronConfig
from spark_nemo.models.param_mapping import map_params
from spark_nemo.models.spec import ModelSpec

Shapes = dict[str, tuple[int, ...]]
"""Megatron's parameter names and the shapes of one rank's shards."""


@dataclass(frozen=True)
class StageParameters:
    """Parameters of one rank of a pipeline stage, under the first of their Megatron names.

    The ranks of a stage hold different slices of the same shapes.
    """

    dense: Shapes = field(default_factory=dict)
    """Parameters that every data-parallel replica has."""
    experts: Shapes = field(default_factory=dict)
    """Parameters that the expert-parallel ranks divide."""

    @property
    def all(self) -> Shapes:
        """Dense parameters and experts."""
        return self.dense | self.experts

    @property
    def num_elements(self) -> int:
        """Elements of all parameters."""
        return sum(math.prod(size) for size in self.all.values())


def stage_parameters(spec: ModelSpec, layout: MegatronConfig) -> list[StageParameters]:
    """Return the parameters of a rank of each pipeline stage.

    Fused rows, the padded vocabulary and the last stage's copy of tied embeddings are counted.
    """
    stages = [StageParameters() for _ in range(layout.pipeline_parallel)]
    for param in map_params(spec, layout.pipeline_parallel, layout.expert_parallel):
        if param.expert_rank not in (None, 0):  # the other expert-parallel ranks are alike
            continue
        stage = stages[param.stage]
        shapes = stage.dense if param.expert is None else stage.experts
        shapes[param.megatron_names[0]] = param.shard_shape(spec, layout.tensor_parallel)
    return stages
