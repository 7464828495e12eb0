"""Which parameters every rank holds, from the table that also loads and exports them (``hf_weights``)."""

from __future__ import annotations

import math

import torch

from spark_nemo.megatron.hf_weights import Rule, placed_rules
from spark_nemo.megatron.model_shape import ModelShape

StageParameters = dict[str, tuple[int, ...]]
"""Megatron's names (the first of a rule's possible ones) and the shapes of one rank's shards."""


def stage_parameters(shape: ModelShape, tensor_parallel: int, pipeline_parallel: int) -> list[StageParameters]:
    """The parameters of a tensor-parallel rank of each pipeline stage; ranks of one stage have the same shapes.

    The rules' own transforms are run on the meta device, so fused rows, padded vocabularies and the last stage's copy
    of tied embeddings are counted as they are made. No weight is allocated.
    """
    stages: list[StageParameters] = [{} for _ in range(pipeline_parallel)]
    shards: dict[int, tuple[int, ...]] = {}
    kept: list[Rule] = []  # alive, so that an id is not used twice
    for placed in placed_rules(shape, pipeline_parallel):
        if id(placed.rule) not in shards:
            tensors = [torch.empty(size, device="meta") for size in placed.hf.values()]
            cut = placed.rule.transform.to_shards(tensors, shape, tensor_parallel)
            shards[id(placed.rule)] = tuple(cut[0].shape)
            kept.append(placed.rule)
        stages[placed.stage][placed.megatron[0]] = shards[id(placed.rule)]
    return stages


def num_elements(parameters: StageParameters) -> int:
    """Their elements together."""
    return sum(math.prod(size) for size in parameters.values())
