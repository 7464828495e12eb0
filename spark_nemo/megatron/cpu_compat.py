"""megatron-core 0.16 on a machine without CUDA: in ``cuda_means_cpu()``, "cuda" is the CPU.

megatron-core makes "cuda" tensors in its schedules, its optimizer and its recomputation. With CUDA
this module does nothing. Function modes belong to a thread, so every public method of the worker
enters the mode, and callers may use any thread.
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
    """Return the device this process computes on."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def cuda_means_cpu() -> contextlib.AbstractContextManager[Any]:
    """Return the context for code that calls megatron-core; a null context with CUDA."""
    if torch.cuda.is_available():
        return contextlib.nullcontext()
    _patch_cuda_entry_points()
    return _CudaMeansCpu()


def on_this_device(method: F) -> F:
    """Run a method inside ``cuda_means_cpu()``; a decorator.

    Not for generators: the mode would stay active in their caller.
    """

    @functools.wraps(method)
    def wrapped(*args: object, **kwargs: object) -> object:
        with cuda_means_cpu():
            return method(*args, **kwargs)

    return wrapped  # type: ignore[return-value]


def seed_everything(seed: int) -> None:
    """Seed torch and Megatron's tracker, the same on all ranks.

    The models have no dropout, so they draw no random numbers after initialisation.
    """
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    torch.manual_seed(seed)
    # The inference tracker is the one that keeps no CUDA generator state.
    with cuda_means_cpu():
        model_parallel_cuda_manual_seed(
            seed, inference_rng_tracker=not torch.cuda.is_available(), force_reset_rng=True
        )


class _CudaMeansCpu(TorchFunctionMode):
    """Replace ``device="cuda"`` by the CPU in every torch call of this thread."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is torch.Tensor.cuda:  # tied embeddings over several pipeline stages
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # Optimizers assert torch.cuda.FloatTensor.
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if not kwargs:
            return func(*args)
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            kwargs = {**kwargs, "device": "cpu"}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        return func(*args, **kwargs)


class _NoStream:
    """Replacement of a CUDA stream or event; every method returns another (``record_event``).

    A class, because libraries write ``torch.cuda.Stream | None`` in annotations.
    """

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., _NoStream]:
        return lambda *args, **kwargs: _NoStream()


@functools.cache
def _patch_cuda_entry_points() -> None:
    """Replace CUDA functions once per process, where they take no tensor.

    A function mode does not see such calls.
    """
    from megatron.core.tensor_parallel import random as megatron_random
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = lambda *args, **kwargs: None
    torch.cuda.Stream = torch.cuda.Event = _NoStream
    torch.cuda.current_stream = lambda *args, **kwargs: _NoStream()
    torch.cuda.stream = lambda *args, **kwargs: contextlib.nullcontext()
    # Recomputation saves and restores the generator's state.
    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda *args, **kwargs: None
    # Routers compare with None what the failed import of Transformer Engine left undefined.
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    token_dispatcher.maybe_move_tensor_to_cpu = _as_numpy


def _as_numpy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Convert split sizes, which the exchange between experts needs as numbers.

    Megatron's version converts CUDA tensors only.
    """
    if as_numpy and torch.is_tensor(tensor):
        return tensor.numpy()
    return tensor
