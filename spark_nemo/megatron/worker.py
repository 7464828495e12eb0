"""One trainer rank: its part of a model, with its optimizer. The trainer's entry to Megatron.

The public methods of ``MegatronWorker`` come first: build, train step, log-probabilities, weights,
checkpoints, export. Their helpers follow.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from spark_nemo.config import MegatronConfig, OptimizerConfig
from spark_nemo.config.errors import ConfigError
from spark_nemo.models.hf_config import read_hf_config
from spark_nemo.models.hf_folder import write_model_files
from spark_nemo.models.param_mapping import hf_tensor_shapes
from spark_nemo.models.spec import ModelSpec
from spark_nemo.models.tokenizer_check import check_tokenizer
from spark_nemo.utils.files import atomic_folder

from . import NonFiniteGradient, checkpoint, hf_files, hf_weights, process_groups
from .cpu_compat import device, on_this_device, seed_everything
from .optimizer import build_optimizer, clip_and_step, wrap_for_gradients
from .packed_batch import PackedBatch
from .packed_gpt import DTYPES, build_model

LossFn = Callable[[Tensor, Tensor | None, PackedBatch], tuple[Tensor, dict[str, Tensor]]]
"""``(logprobs_T, entropy_T | None, batch) -> (loss_sum, metric_sums)``.

``logprobs_T`` (float32, nats, after temperature) carries the gradient. ``entropy_T`` is a detached
metric, None unless the caller requested it. ``loss_sum`` is the sum over the positions of this
micro-batch, not a mean; so is every metric. ``batch`` is the caller's, plus a masked dummy sequence
under sequence parallelism.
"""

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class StepResult:
    """Loss, gradient norm and metrics of one optimizer step; the same numbers on every rank."""

    loss: float
    """Sum of ``loss_sum`` over all micro-batches and data-parallel ranks / ``num_tokens``."""
    grad_norm: float
    """Global L2 norm of the gradient of ``loss``, before clipping."""
    lr: float
    """Learning rate of this step."""
    num_tokens: float
    """Sum of ``loss_mask_T`` over all micro-batches and data-parallel ranks."""
    metrics: dict[str, float]
    """Sums over all micro-batches and data-parallel ranks; divide by what they count."""


class MegatronWorker:
    """One rank's part of a model, with its optimizer.

    Every method is collective: all ranks call it, in the same order. Build a worker with
    ``from_hf`` or ``from_config``:

    >>> worker = MegatronWorker.from_hf(                             # doctest: +SKIP
    ...     folder,
    ...     MegatronConfig(dtype="float32"),
    ...     seed=0,
    ...     optimizer=OptimizerConfig(),
    ...     total_steps=100,
    ... )
    >>> result = worker.train_step(micro_batches, loss_fn)           # doctest: +SKIP
    >>> worker.save_hf("out", source_dir=folder)                     # doctest: +SKIP
    """

    @classmethod
    def from_hf(
        cls,
        model_dir: str | Path,
        layout: MegatronConfig,
        seed: int,
        optimizer: OptimizerConfig | None = None,
        total_steps: int | None = None,
    ) -> MegatronWorker:
        """Load a Hugging Face model folder; without ``optimizer``, for forward passes only.

        ``total_steps`` (optimizer steps of the whole run) sets warm-up and decay. Raises
        ``ConfigError`` naming the missing folder, the wrong tensor, or the ``megatron.*`` setting
        that does not fit the model.
        """
        hf_config = read_hf_config(model_dir)
        spec = ModelSpec.from_hf(hf_config, f"{model_dir}/config.json")
        check_tokenizer(model_dir, spec)
        worker = cls(hf_config, spec, layout, seed)
        worker.load_hf_weights(model_dir)
        worker._add_optimizer(optimizer, total_steps)
        return worker

    @classmethod
    def from_config(
        cls,
        hf_config: dict[str, Any],
        layout: MegatronConfig,
        seed: int,
        optimizer: OptimizerConfig | None = None,
        total_steps: int | None = None,
    ) -> MegatronWorker:
        """Build a model with random weights that do not depend on ``layout``."""
        worker = cls(hf_config, ModelSpec.from_hf(hf_config, "hf_config"), layout, seed)
        shapes = hf_tensor_shapes(worker.spec)
        worker._fill(hf_files.RandomTensors(shapes, worker.spec, seed), "random initialisation")
        worker._add_optimizer(optimizer, total_steps)
        return worker

    def __init__(
        self, hf_config: dict[str, Any], spec: ModelSpec, layout: MegatronConfig, seed: int
    ) -> None:
        """Make process groups and an uninitialised model; for ``from_hf`` and ``from_config``."""
        from megatron.core import parallel_state

        spec.check_layout(layout)
        process_groups.initialize(layout)
        seed_everything(seed)
        self.hf_config = hf_config
        self.spec = spec
        self.layout = layout
        self.model = build_model(spec, layout)
        self.dp_rank: int = parallel_state.get_data_parallel_rank()
        self.dp_size: int = parallel_state.get_data_parallel_world_size()
        self.is_main: bool = process_groups.rank() == 0
        """True on global rank 0, the rank that writes files and talks to the engine."""
        self._reports = (
            parallel_state.is_pipeline_last_stage()
            and parallel_state.get_tensor_model_parallel_rank() == 0
        )
        """True on the one rank of each data-parallel replica that counts losses and tokens."""
        self._pipeline_group = parallel_state.get_pipeline_model_parallel_group()
        self._trained: torch.nn.Module = self.model
        self._optimizer = None
        self._scheduler = None
        self._borrowed = False

    @property
    def step(self) -> int:
        """Optimizer steps made so far."""
        return self._scheduler.num_steps if self._scheduler is not None else 0

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights and of the tensors that ``export_hf`` yields."""
        return DTYPES[self.layout.dtype]

    @property
    def quadratic_cost(self) -> float:
        """c in the training cost ``T + c T^2`` of a sequence of T positions.

        Multiplications of causal attention (queries by keys, weights by values, over T / 2
        positions on average) per multiplication with a weight matrix. Only the experts that process
        a token count.
        """
        spec = self.spec
        experts = spec.experts
        attention = spec.num_layers * spec.num_heads * spec.head_dim
        width = experts.per_token * experts.ffn_size if experts is not None else spec.ffn_size
        layer = 2 * (spec.num_heads + spec.num_kv_heads) * spec.head_dim + 3 * width
        return attention / (spec.hidden_size * (spec.num_layers * layer + spec.vocab_size))

    # Training and scoring

    @on_this_device
    def train_step(
        self,
        micro_batches: Sequence[PackedBatch],
        loss_fn: LossFn,
        temperature: float = 1.0,
        with_entropy: bool = False,
        check: Callable[[], object] | None = None,
    ) -> StepResult:
        """Make one optimizer step on the micro-batches of all data-parallel ranks.

        Each rank passes its own micro-batches, in any number. The gradient is that of
        ``StepResult.loss``, whatever the split into ranks and micro-batches. ``check`` runs on
        every rank after the backward pass and before any weight changes; an error from it ends the
        step.

        Raises ``NonFiniteGradient`` on every rank, with weights unchanged, when the gradient is not
        finite, and ``ValueError`` when every loss mask is zero.
        """
        if self._optimizer is None:
            raise RuntimeError(
                "this worker has no optimizer; pass optimizer=OptimizerConfig(...) to build it"
            )
        if self._borrowed:
            raise RuntimeError("train_step inside use_weights would train the borrowed weights")
        num_tokens = self._global_num_tokens(micro_batches)
        reports: list[tuple[float, dict[str, float]]] = []

        def loss(
            output: tuple[Tensor, Tensor | None], batch: PackedBatch
        ) -> tuple[Tensor, dict[str, Any]]:
            if batch is _EMPTY:
                loss_sum, metrics = output[0].sum() * 0, {}
            else:
                loss_sum, metrics = loss_fn(*output, batch)
            reports.append((float(loss_sum), {key: float(value) for key, value in metrics.items()}))
            # Divided here and not by Megatron, which counts tokens in an integer after the backward
            # pass: loss masks may be fractions.
            return loss_sum / num_tokens, {}

        self._trained.zero_grad_buffer()
        self._optimizer.zero_grad()
        # A rank without micro-batches still takes part in the gradient reduction.
        scheduled = self._equal_in_number(micro_batches) or [_EMPTY]
        self._run_pipeline(
            self._trained, scheduled, temperature, with_entropy, loss, forward_only=False
        )
        total, metrics = self._sum_reports(reports)
        if check is not None:
            check()
        lr = self._scheduler.get_lr({})
        try:
            grad_norm = clip_and_step(self._optimizer)
        except NonFiniteGradient as error:
            raise NonFiniteGradient(
                f"optimizer step {self.step}: {error} (loss={total / num_tokens})"
            ) from error
        self._scheduler.step(1)
        return StepResult(total / num_tokens, grad_norm, lr, num_tokens, metrics)

    @on_this_device
    def logprobs(
        self, micro_batches: Sequence[PackedBatch], temperature: float = 1.0
    ) -> list[Tensor]:
        """Return float32 ``logprobs_T`` of each micro-batch of this data-parallel rank.

        All pipeline stages of the rank get them.
        """
        scheduled = self._equal_in_number(micro_batches)
        if not scheduled:
            return []
        outputs: list[Tensor] = []

        def keep(
            output: tuple[Tensor, Tensor | None], batch: PackedBatch
        ) -> tuple[Tensor, dict[str, Any]]:
            outputs.append(output[0])
            return output[0].sum(), {}

        self.model.eval()  # or activations would be recomputed, as training does
        try:
            with torch.no_grad():
                self._run_pipeline(
                    self.model, scheduled, temperature, False, keep, forward_only=True
                )
        finally:
            self.model.train()
        return [
            self._from_last_stage(batch.num_tokens, outputs[i] if outputs else None)
            for i, batch in enumerate(micro_batches)
        ]

    # Weights

    def snapshot(self) -> Weights:
        """Copy this rank's weights (without optimizer state) to CPU memory, for ``use_weights``."""
        return {
            name: parameter.detach().to("cpu", copy=True)
            for name, parameter in self.model.named_parameters()
        }

    @contextmanager
    def use_weights(self, snapshot: Weights) -> Iterator[None]:
        """Run forward passes with other weights, then restore the current ones bit for bit."""
        if self._borrowed:
            raise RuntimeError("use_weights does not nest")
        current = self.snapshot()
        self._borrowed = True
        try:
            self._copy_in(snapshot)
            yield
        finally:
            self._copy_in(current)
            self._borrowed = False

    def load_hf_weights(self, folder: str | Path) -> None:
        """Replace the weights by those of a model folder of the same shape.

        Raises ``ConfigError`` naming a wrong tensor.
        """
        self._fill(hf_files.SafetensorsFolder(folder), str(folder))

    # Checkpoints

    def save_checkpoint(
        self,
        folder: str | Path,
        state: dict[str, Any],
        keep: int = 2,
        files: Mapping[str, bytes] | None = None,
    ) -> Path:
        """Write ``folder/step-N``, point ``folder/latest`` at it, keep the newest ``keep``.

        ``state`` is the caller's own state, JSON-able and the same on every rank. ``files`` are
        more of it, from the main rank, to be read in ``checkpoint.newest(folder)``.
        """
        self._require_optimizer()
        return checkpoint.save(
            folder,
            self.model,
            self._optimizer,
            self._scheduler,
            state,
            keep,
            files or {},
            self.hf_config,
        )

    def load_checkpoint(self, folder: str | Path) -> dict[str, Any]:
        """Restore the newest checkpoint, saved under any layout, and return the caller's state.

        Training then continues as if it had not stopped, bit for bit under the same layout. Raises
        ``ConfigError`` without a checkpoint (``checkpoint.has_checkpoint`` tells).
        """
        self._require_optimizer()
        return checkpoint.load(folder, self.model, self._optimizer, self._scheduler)

    # Export

    def export_hf(self) -> Iterator[tuple[str, Tensor]]:
        """Yield full tensors under Hugging Face names, one parameter at a time, on every rank.

        Every rank must iterate to the end, because each parameter is gathered by a collective. A
        tensor is only valid until the next one; copy it to keep it.
        """
        return hf_weights.export_tensors(self.model, self.spec)

    def save_hf(self, folder: str | Path, source_dir: str | Path | None) -> None:
        """Write a Hugging Face model folder atomically, with ``source_dir``'s other files.

        Raises ``OSError`` on every rank when rank 0 cannot write.
        """
        shapes = hf_tensor_shapes(self.spec)
        tensors = self.export_hf()
        error: OSError | None = None
        if self.is_main:
            try:
                with atomic_folder(folder) as temporary:
                    write_model_files(
                        temporary,
                        self.hf_config,
                        hf_files.dtype_name(self.dtype),
                        None if source_dir is None else Path(source_dir),
                    )
                    hf_files.write_tensors(temporary, tensors, shapes, self.dtype)
            except OSError as caught:
                error = caught
        # Every rank takes part in every gather: the other ranks, and rank 0 after it has failed.
        for _ in tensors:
            pass
        error = process_groups.broadcast_object(error)
        if error is not None:
            raise error

    # Helpers

    @on_this_device
    def _add_optimizer(self, settings: OptimizerConfig | None, total_steps: int | None) -> None:
        if settings is None:
            self.model.requires_grad_(False)
            return
        self._trained = wrap_for_gradients(self.model, self.layout)
        self._optimizer, self._scheduler = build_optimizer(
            self._trained, settings, self.layout, total_steps
        )

    def _require_optimizer(self) -> None:
        if self._optimizer is None:
            raise ConfigError(
                "checkpoints need an optimizer; build the worker with "
                "optimizer=OptimizerConfig(...)"
            )

    @on_this_device
    def _fill(self, tensors: Any, origin: str) -> None:
        hf_weights.load_tensors(self.model, self.spec, tensors, origin)
        if self._optimizer is not None:
            self._optimizer.reload_model_params()  # the float32 copies under bfloat16 weights

    def _copy_in(self, weights: Weights) -> None:
        # In place: the optimizer's flat buffers are the storage of these tensors.
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(weights[name])

    def _equal_in_number(self, micro_batches: Sequence[PackedBatch]) -> list[PackedBatch]:
        """Pad with empty micro-batches to the busiest rank's number under expert parallelism.

        There, ranks exchange tokens in every layer of every micro-batch, so a rank that ran fewer
        would leave the others waiting.
        """
        if self.layout.expert_parallel == 1:
            return list(micro_batches)
        longest = max(process_groups.gather_objects(len(micro_batches)))
        return [*micro_batches, *[_EMPTY] * (longest - len(micro_batches))]

    def _global_num_tokens(self, micro_batches: Sequence[PackedBatch]) -> float:
        own = math.fsum(float(batch.loss_mask_T.double().sum()) for batch in micro_batches)
        # Tensor and pipeline ranks have the same micro-batches: one of them counts.
        total = math.fsum(process_groups.gather_objects(own if self._reports else 0.0))
        if total <= 0:
            raise ValueError(
                "loss_mask_T is zero everywhere in this step; there is nothing to train on"
            )
        return total

    def _sum_reports(
        self, reports: list[tuple[float, dict[str, float]]]
    ) -> tuple[float, dict[str, float]]:
        gathered = process_groups.gather_objects(reports if self._reports else [])
        everything = [report for of_rank in gathered for report in of_rank]
        loss = _exact_sum([loss for loss, _ in everything])
        keys = sorted({key for _, metrics in everything for key in metrics})
        metrics = {
            key: _exact_sum([metrics.get(key, 0.0) for _, metrics in everything]) for key in keys
        }
        return loss, metrics

    def _run_pipeline(
        self,
        model: torch.nn.Module,
        micro_batches: Sequence[PackedBatch],
        temperature: float,
        with_entropy: bool,
        loss: Callable[..., Any],
        forward_only: bool,
    ) -> None:
        """Run micro-batches through the pipeline; the last stage calls ``loss`` in their order."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        def forward_step(
            batches: Iterator[PackedBatch], model: torch.nn.Module
        ) -> tuple[Any, Callable[..., Any]]:
            batch = next(batches)
            moved = batch.to(device())
            if self.layout.sequence_parallel:
                moved = moved.padded_to_multiple_of(self.layout.tensor_parallel)
            # ``loss`` recognises the empty batch by identity, whatever the model was given.
            loss_batch = batch if batch is _EMPTY else moved
            output = model(moved, temperature, with_entropy)
            return output, functools.partial(_per_token_loss, loss, loss_batch)

        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(micro_batches),
            model=model,
            num_microbatches=len(micro_batches),
            seq_length=max(batch.num_tokens for batch in micro_batches),
            micro_batch_size=1,
            forward_only=forward_only,
        )

    def _from_last_stage(self, length: int, padded_T: Tensor | None) -> Tensor:
        logprobs_T = torch.empty(length, device=device())
        if padded_T is not None:
            logprobs_T.copy_(padded_T[:length])  # without the padding of sequence parallelism
        if self.layout.pipeline_parallel > 1:
            last_stage = self._pipeline_group.size() - 1
            dist.broadcast(
                logprobs_T,
                dist.get_global_rank(self._pipeline_group, last_stage),
                group=self._pipeline_group,
            )
        return logprobs_T


_EMPTY = PackedBatch(
    tokens_T=torch.zeros(1, dtype=torch.int64),
    labels_T=torch.zeros(1, dtype=torch.int64),
    positions_T=torch.zeros(1, dtype=torch.int64),
    cu_seqlens_N=torch.tensor([0, 1], dtype=torch.int32),
    loss_mask_T=torch.zeros(1),
)
"""Micro-batch of a data-parallel rank that has nothing to compute."""


def _per_token_loss(
    loss: Callable[..., Any], batch: PackedBatch, output: Any
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Return Megatron's (loss, number of tokens, report); 0 tokens: do not rescale gradients."""
    value, report = loss(output, batch)
    return value, torch.zeros((), dtype=torch.int32, device=value.device), report


def _exact_sum(values: list[float]) -> float:
    """Sum exactly rounded, so independent of the order; plainly where fsum raises (inf - inf)."""
    return math.fsum(values) if all(map(math.isfinite, values)) else sum(values)
