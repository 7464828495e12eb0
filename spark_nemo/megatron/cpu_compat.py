"""Run megatron-core 0.16 on a machine without CUDA: inside ``cuda_means_cpu()``, the device "cuda"
is the CPU.

megatron-core asks for "cuda" tensors in its schedules, its optimizer and its recomputation. Where
CUDA exists nothing here does anything. Function modes belong to a thread, so every public method of
the worker enters the mode itself and callers may use any thread.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.overrides import TorchFunctionMode

F = TypeVar("F", bound=Callable[..., Any])


def device() -> torch.device:
    """The device this process computes on."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def cuda_means_cpu() -> contextlib.AbstractContextManager[Any]:
    """Context for code that calls megatron-core. A null context where CUDA exists."""
    if torch.cuda.is_available():
        return contextlib.nullcontext()
    _patch_cuda_entry_points()
    return _CudaMeansCpu()


def on_this_device(method: F) -> F:
    """Decorator: run a method inside ``cuda_means_cpu()``. Not for generators: the mode would leak
    to their caller.
    """

    @functools.wraps(method)
    def wrapped(*args: object, **kwargs: object) -> object:
        with cuda_means_cpu():
            return method(*args, **kwargs)

    return wrapped  # type: ignore[return-value]


def seed_everything(seed: int) -> None:
    """Seed torch and Megatron's tracker. The same seed on all ranks; models here draw nothing after
    initialisation.
    """
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    torch.manual_seed(seed)
    # The inference tracker is the one that keeps no CUDA generator state.
    with cuda_means_cpu():
        model_parallel_cuda_manual_seed(
            seed, inference_rng_tracker=not torch.cuda.is_available(), force_reset_rng=True
        )


class _CudaMeansCpu(TorchFunctionMode):
    """Rewrites ``device="cuda"`` to the CPU in every torch call of this thread."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is torch.Tensor.cuda:  # tied embeddings over several pipeline stages
            return args[0]
        if (
            func is torch.Tensor.type and len(args) == 1 and not kwargs
        ):  # optimizers assert torch.cuda.FloatTensor
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if not kwargs:
            return func(*args)
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            kwargs = {**kwargs, "device": "cpu"}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        return func(*args, **kwargs)


class _NoStream:
    """Stands for a CUDA stream or event, and gives one (``record_event``). A class, because others
    write ``torch.cuda.Stream | None``.
    """

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., _NoStream]:
        return lambda *args, **kwargs: _NoStream()


@functools.cache
def _patch_cuda_entry_points() -> None:
    """Functions that take no tensor cannot be met by a function mode; they are replaced once per
    process.
    """
    from megatron.core.tensor_parallel import random as megatron_random
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = lambda *args, **kwargs: None
    torch.cuda.Stream = torch.cuda.Event = _NoStream
    torch.cuda.current_stream = lambda *args, **kwargs: _NoStream()
    torch.cuda.stream = lambda *args, **kwargs: contextlib.nullcontext()
    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: (
        torch.get_rng_state()
    )  # recomputation
    megatron_random._set_cuda_rng_state = lambda *args, **kwargs: None
    if not hasattr(
        moe_utils, "te_general_gemm"
    ):  # routers test for None what the failed import left undefined
        moe_utils.te_general_gemm = None
    # Split sizes must be numbers for the exchange between experts; only those that come from CUDA
    # are converted.
    token_dispatcher.maybe_move_tensor_to_cpu = lambda tensor, as_numpy=False, record_stream=False: (
        tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
    )
