"""Load Hugging Face weights into this rank's shards of a Megatron model, and export them again.

Nothing is filled in by default: a tensor that is missing, surplus or of another shape is an error
that names it, and so is a Megatron parameter that no tensor was loaded into.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from spark_nemo.config.errors import ConfigError
from spark_nemo.models.param_mapping import (
    EMBEDDING,
    HEAD,
    MappedParam,
    hf_tensor_shapes,
    map_params,
)
from spark_nemo.models.spec import ModelSpec

from .param_shards import from_gathered, to_shards


def load_tensors(
    model: torch.nn.Module, spec: ModelSpec, source: Mapping[str, Tensor], origin: str
) -> None:
    """Write ``source`` (read tensor by tensor) into this rank's shards of ``model``.

    Needs no communication. Raises ``ConfigError`` naming the tensor that ``origin`` lacks, has too
    many or has in another shape.
    """
    check_names(set(source), spec, origin)
    ranks = _ParallelRanks.current()
    if ranks.stage == 0:
        check_tied_head(source, spec, origin)
    parameters = dict(model.named_parameters())
    written: set[str] = set()
    for param in map_params(spec, ranks.pp, ranks.ep):
        if not ranks.hold(param):
            continue
        tensors = [_read(source, name, size, origin) for name, size in param.hf_shapes.items()]
        tp, tp_rank = ranks.sharding(param)
        shard = to_shards(param.split, tensors, spec, tp)[tp_rank]
        name = _find(param, parameters)
        with torch.no_grad():
            parameters[name].copy_(shard)
        written.add(name)
    missing = sorted(set(parameters) - written)
    if missing:
        raise ConfigError(
            f"parameter {missing[0]} of model_type={spec.family} has no rule in "
            "spark_nemo/models/param_mapping.py"
        )


def export_tensors(model: torch.nn.Module, spec: ModelSpec) -> Iterator[tuple[str, Tensor]]:
    """Yield the full Hugging Face tensors on every rank, one parameter at a time.

    Collective: all ranks must iterate to the end. The stage that owns a parameter gathers it over
    its tensor-parallel group and broadcasts it over the pipeline group. An expert's owner broadcasts
    it over the expert-parallel group first.
    """
    ranks = _ParallelRanks.current()
    parameters = dict(model.named_parameters())
    exported: set[str] = set()
    for param in map_params(spec, ranks.pp, ranks.ep):
        if exported.issuperset(param.hf_shapes):  # the last stage's copy of tied embeddings
            continue
        exported.update(param.hf_shapes)
        if ranks.hold(param):
            tensors = _gather_tensors(param, parameters, spec, ranks)
        else:
            like = next(iter(parameters.values()))
            tensors = [
                torch.empty(size, dtype=like.dtype, device=like.device)
                for size in param.hf_shapes.values()
            ]
        for name, tensor in zip(param.hf_shapes, tensors):
            if param.stage == ranks.stage and param.expert_rank is not None and ranks.ep > 1:
                expert_group = parallel_state.get_expert_model_parallel_group()
                _broadcast(tensor, param.expert_rank, expert_group)
            if ranks.pp > 1:
                pipeline_group = parallel_state.get_pipeline_model_parallel_group()
                _broadcast(tensor, param.stage, pipeline_group)
            yield name, tensor
        if tensor.is_cuda:
            # NCCL's watchdog measures from when a call is queued. Without this, a rank that only
            # takes part would queue all calls at once, and the whole export, with what the main rank
            # does between two tensors, would have to end within one call's timeout.
            torch.cuda.current_stream(tensor.device).synchronize()
        # The next parameter must not be gathered while these tensors are alive.
        del tensors, tensor


def check_tied_head(source: Mapping[str, Tensor], spec: ModelSpec, origin: str) -> None:
    """Raise ``ConfigError`` if a tied model has an output layer that differs from its embedding."""
    if not spec.tied_embeddings or HEAD not in source:
        return
    if not torch.equal(source[HEAD], source[EMBEDDING]):
        raise ConfigError(
            f"tensor {HEAD} in {origin} is not {EMBEDDING}, though config.json has "
            "tie_word_embeddings=true: set it to false, or remove the tensor"
        )


def check_names(names: set[str], spec: ModelSpec, origin: str) -> None:
    """Raise ``ConfigError`` naming the first tensor that ``origin`` lacks or has too many."""
    expected = set(hf_tensor_shapes(spec))
    # Caches of rotary angles and a stored copy of a tied head carry no information of their own.
    ignored = {name for name in names if re.search(r"rotary_emb\.inv_freq$", name)}
    if spec.tied_embeddings:
        ignored.add(HEAD)
    missing = sorted(expected - names)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ConfigError(f"{origin} lacks tensor {missing[0]}{more}")
    surplus = sorted(names - expected - ignored)
    if surplus:
        more = f", and {len(surplus) - 1} more" if len(surplus) > 1 else ""
        raise ConfigError(f"{origin} has tensor {surplus[0]}, which the model does not have{more}")


@dataclass(frozen=True)
class _ParallelRanks:
    """Sizes of the model-parallel groups, and this process's rank in each."""

    tp: int
    tp_rank: int
    pp: int
    stage: int
    ep: int
    ep_rank: int

    @classmethod
    def current(cls) -> _ParallelRanks:
        return cls(
            tp=parallel_state.get_tensor_model_parallel_world_size(),
            tp_rank=parallel_state.get_tensor_model_parallel_rank(),
            pp=parallel_state.get_pipeline_model_parallel_world_size(),
            stage=parallel_state.get_pipeline_model_parallel_rank(),
            ep=parallel_state.get_expert_model_parallel_world_size(),
            ep_rank=parallel_state.get_expert_model_parallel_rank(),
        )

    def hold(self, param: MappedParam) -> bool:
        """Return True if this process holds ``param`` or a shard of it."""
        return param.stage == self.stage and param.expert_rank in (None, self.ep_rank)

    def sharding(self, param: MappedParam) -> tuple[int, int]:
        """Return the number of shards of ``param`` and the one held here."""
        if param.expert is not None:  # an expert is never cut
            return 1, 0
        return self.tp, self.tp_rank


def _gather_tensors(
    param: MappedParam,
    parameters: dict[str, torch.nn.Parameter],
    spec: ModelSpec,
    ranks: _ParallelRanks,
) -> list[Tensor]:
    tp, _ = ranks.sharding(param)
    shard = parameters[_find(param, parameters)].detach()
    if tp == 1 or param.split.shard_dim is None:
        gathered = shard
    else:
        gathered = _gather(shard)
    return [x.contiguous() for x in from_gathered(param.split, gathered, spec, tp)]


def _gather(shard: Tensor) -> Tensor:
    """Return the shards of all tensor-parallel ranks below each other."""
    group = parallel_state.get_tensor_model_parallel_group()
    gathered = shard.new_empty(group.size() * shard.shape[0], *shard.shape[1:])
    # Not all_gather: over NCCL it receives into a second buffer of the same size, and copies.
    dist.all_gather_into_tensor(gathered, shard.contiguous(), group=group)
    return gathered


def _broadcast(tensor: Tensor, group_rank: int, group: dist.ProcessGroup) -> None:
    dist.broadcast(tensor, src=dist.get_global_rank(group, group_rank), group=group)


def _find(param: MappedParam, parameters: dict[str, torch.nn.Parameter]) -> str:
    for name in param.megatron_names:
        if name in parameters:
            return name
    raise ConfigError(f"the Megatron model has no parameter {' or '.join(param.megatron_names)}")


def _read(source: Mapping[str, Tensor], name: str, size: tuple[int, ...], origin: str) -> Tensor:
    tensor = source[name]
    if tuple(tensor.shape) != size:
        raise ConfigError(
            f"tensor {name} in {origin} has shape {tuple(tensor.shape)}, config.json says {size}"
        )
    return tensor
