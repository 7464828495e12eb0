"""Hugging Face weights to and from this rank's share of a Megatron model, by the table of its
family.

Nothing is defaulted: a tensor that is missing, surplus or misshapen is an error that names it, and
so is a Megatron parameter that no rule wrote.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from spark_nemo.config.errors import ConfigError

from .families import FAMILIES, Rule
from .model_shape import ModelShape

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class PlacedRule:
    """A rule for one layer: the pipeline stage that holds it, and names with layer and expert
    filled in.
    """

    stage: int
    rule: Rule
    megatron: tuple[str, ...]
    hf: dict[str, tuple[int, ...]]
    expert: int | None = None
    """Which of its layer's experts this is; None for what is no expert."""
    expert_rank: int | None = None
    """The expert-parallel rank that holds the expert; None where all do."""


def placed_rules(
    shape: ModelShape, pipeline_parallel: int, expert_parallel: int = 1
) -> Iterator[PlacedRule]:
    """Every parameter of the whole model in Hugging Face order, with where it lives. The same on
    every rank.
    """
    table, per_stage = FAMILIES[shape.family].table(shape), shape.num_layers // pipeline_parallel
    per_rank = shape.experts.count // expert_parallel if shape.experts else 0

    def place(stage: int, rule: Rule, layer: int = 0, expert: int | None = None) -> PlacedRule:
        inside = {"i": layer % per_stage, "e": expert % per_rank if expert is not None else None}
        local = tuple(name.format(**inside) for name in rule.megatron)
        hf = {name.format(i=layer, e=expert): size for name, size in rule.hf.items()}
        return PlacedRule(
            stage, rule, local, hf, expert, None if expert is None else expert // per_rank
        )

    def in_layer(layer: int) -> Iterator[PlacedRule]:
        for each, rules in itertools.groupby(table.layer, lambda rule: rule.per_expert):
            rules = list(rules)
            for expert in range(shape.experts.count) if each else [None]:
                yield from (place(layer // per_stage, rule, layer, expert) for rule in rules)

    yield from (place(0, rule) for rule in table.first)
    for layer in range(shape.num_layers):
        yield from in_layer(layer)
    for rule in table.last:
        # Tied embeddings on one stage are one parameter; on several, the last stage has a copy of
        # its own.
        if not (
            "output_layer.weight" in rule.megatron
            and shape.tied_embeddings
            and pipeline_parallel == 1
        ):
            yield place(pipeline_parallel - 1, rule)


def hf_tensor_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the model's Hugging Face tensors, in the order of ``export_tensors``."""
    return {name: size for placed in placed_rules(shape, 1) for name, size in placed.hf.items()}


def load_tensors(
    model: torch.nn.Module, shape: ModelShape, source: Mapping[str, Tensor], origin: str
) -> None:
    """Write ``source`` (read tensor by tensor) into this rank's share of ``model``. No
    communication.

    Raises ``ConfigError`` naming the tensor that is missing from ``origin``, surplus in it, or of
    another shape.
    """
    check_names(set(source), shape, origin)
    here = _Place.of_this_rank()
    if here.stage == 0:
        check_tied_head(source, shape, origin)
    parameters, written = dict(model.named_parameters()), set()
    for placed in placed_rules(shape, here.pp, here.ep):
        if placed.stage != here.stage or placed.expert_rank not in (None, here.ep_rank):
            continue
        tensors = [_read(source, name, size, origin) for name, size in placed.hf.items()]
        name = _find(placed, parameters)
        tp, tp_rank = here.shards_of(placed)
        shard = placed.rule.transform.to_shards(tensors, shape, tp)[tp_rank]
        with torch.no_grad():
            parameters[name].copy_(shard)
        written.add(name)
    if forgotten := sorted(set(parameters) - written):
        raise ConfigError(
            f"parameter {forgotten[0]} has no rule in megatron/families/{shape.family}.py"
        )


def export_tensors(model: torch.nn.Module, shape: ModelShape) -> Iterator[tuple[str, Tensor]]:
    """Full Hugging Face tensors one parameter at a time, on every rank. Collective: all ranks
    iterate to the end.

    The owning stage gathers over its tensor-parallel group (an expert's owner hands it on over the
    expert-parallel group), then hands the tensor on over the pipeline group.
    """
    here = _Place.of_this_rank()
    parameters, seen = dict(model.named_parameters()), set()
    for placed in placed_rules(shape, here.pp, here.ep):
        if seen.issuperset(placed.hf):  # the last stage's copy of tied embeddings
            continue
        seen.update(placed.hf)
        if placed.stage == here.stage and placed.expert_rank in (None, here.ep_rank):
            tp, _ = here.shards_of(placed)
            parameter = parameters[_find(placed, parameters)].detach()
            gathered = (
                parameter
                if tp == 1 or placed.rule.transform.shard_dim is None
                else _gather(parameter)
            )
            tensors = [
                x.contiguous() for x in placed.rule.transform.from_gathered(gathered, shape, tp)
            ]
            del gathered
        else:
            some = next(iter(parameters.values()))
            tensors = [
                torch.empty(size, dtype=some.dtype, device=some.device)
                for size in placed.hf.values()
            ]
        for name, tensor in zip(placed.hf, tensors):
            if placed.stage == here.stage and placed.expert_rank is not None and here.ep > 1:
                _broadcast(
                    tensor, placed.expert_rank, parallel_state.get_expert_model_parallel_group()
                )
            if here.pp > 1:
                _broadcast(tensor, placed.stage, parallel_state.get_pipeline_model_parallel_group())
            yield name, tensor
        if tensor.is_cuda:
            # NCCL's watchdog counts from when a call is queued. A rank that only takes part would
            # queue all of them at once, and the whole export, with what the main rank does between
            # two tensors, had one call's time.
            torch.cuda.current_stream(tensor.device).synchronize()
        del tensors, tensor  # not beside the next parameter's


@dataclass(frozen=True)
class _Place:
    """Where this rank stands in the groups of the model's parallel layout."""

    tp: int
    tp_rank: int
    pp: int
    stage: int
    ep: int
    ep_rank: int

    @classmethod
    def of_this_rank(cls) -> _Place:
        return cls(
            parallel_state.get_tensor_model_parallel_world_size(),
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_pipeline_model_parallel_world_size(),
            parallel_state.get_pipeline_model_parallel_rank(),
            parallel_state.get_expert_model_parallel_world_size(),
            parallel_state.get_expert_model_parallel_rank(),
        )

    def shards_of(self, placed: PlacedRule) -> tuple[int, int]:
        """In how many shards the parameter is cut, and which is here. An expert is never cut."""
        return (self.tp, self.tp_rank) if placed.expert is None else (1, 0)


def _gather(parameter: Tensor) -> Tensor:
    """The shards of all tensor-parallel ranks below each other."""
    group = parallel_state.get_tensor_model_parallel_group()
    gathered = parameter.new_empty(group.size() * parameter.shape[0], *parameter.shape[1:])
    # Not all_gather: over NCCL that receives into a buffer of its own, as large again, and copies.
    dist.all_gather_into_tensor(gathered, parameter.contiguous(), group=group)
    return gathered


def _broadcast(tensor: Tensor, group_rank: int, group: dist.ProcessGroup) -> None:
    dist.broadcast(tensor, src=dist.get_global_rank(group, group_rank), group=group)


def _find(placed: PlacedRule, parameters: dict[str, torch.nn.Parameter]) -> str:
    for name in placed.megatron:
        if name in parameters:
            return name
    raise ConfigError(f"the Megatron model has no parameter {' or '.join(placed.megatron)}")


def _read(source: Mapping[str, Tensor], name: str, size: tuple[int, ...], origin: str) -> Tensor:
    tensor = source[name]
    if tuple(tensor.shape) != size:
        raise ConfigError(
            f"tensor {name} in {origin} has shape {tuple(tensor.shape)}, config.json says {size}"
        )
    return tensor


def check_tied_head(source: Mapping[str, Tensor], shape: ModelShape, origin: str) -> None:
    """Raise ``ConfigError`` when a tied model brings an output layer of its own: it would be lost
    without a word.
    """
    if (
        shape.tied_embeddings
        and HEAD in source
        and not torch.equal(source[HEAD], source[EMBEDDING])
    ):
        raise ConfigError(
            f"tensor {HEAD} in {origin} is not {EMBEDDING}, though config.json has "
            "tie_word_embeddings=true: set it to false, or remove the tensor"
        )


def check_names(names: set[str], shape: ModelShape, origin: str) -> None:
    """Raise ``ConfigError`` naming the first tensor that ``origin`` lacks or has too many."""
    expected = set(hf_tensor_shapes(shape))
    # Caches of rotary angles, and a stored copy of a tied head, hold nothing of their own.
    ignored = {name for name in names if re.search(r"rotary_emb\.inv_freq$", name)}
    if shape.tied_embeddings:
        ignored.add(HEAD)
    if missing := sorted(expected - names):
        raise ConfigError(
            f"{origin} lacks tensor {missing[0]}"
            + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
        )
    if surplus := sorted(names - expected - ignored):
        raise ConfigError(
            f"{origin} has tensor {surplus[0]}, which the model does not have"
            + (f", and {len(surplus) - 1} more" if len(surplus) > 1 else "")
        )
