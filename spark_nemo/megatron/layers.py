"""RMSNorm and SwiGLU in few passes over memory, used without Transformer Engine. Any device.

On a CPU one pass over the activations costs as much as a small matrix product; torch composes both
functions from many passes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _RMSNorm(torch.autograd.Function):
    """``x / rms(x) * weight``, computed in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x32 = x.float()
        inverse_rms = (
            torch.linalg.vector_norm(x32, dim=-1, keepdim=True)
            .square_()
            .div_(x.shape[-1])
            .add_(eps)
            .rsqrt_()
        )
        ctx.save_for_backward(x, weight, inverse_rms)
        return (x32 * inverse_rms).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse_rms = ctx.saved_tensors
        H = x.shape[-1]
        grad_RH = grad.reshape(-1, H).float()
        x_RH = x.reshape(-1, H).float()
        inverse_R1 = inverse_rms.reshape(-1, 1)
        product_RH = grad_RH * x_RH
        grad_weight = product_RH.T @ inverse_R1[:, 0]
        # dx = (grad * weight) / rms - x * sum(grad * weight * x) / (H * rms^3)
        correction_R1 = (product_RH @ weight.float())[:, None].mul_(inverse_R1**3).div_(-H)
        grad_x = (grad_RH * weight).mul_(inverse_R1).addcmul_(x_RH, correction_R1)
        return grad_x.to(x.dtype).view_as(x), grad_weight.to(weight.dtype), None


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over the last dimension. Source: arXiv 1910.07467."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Under sequence parallelism each tensor rank sees a part of the row: Megatron sums the
        # gradients of marked parameters.
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the shape and dtype of ``x``."""
        return _RMSNorm.apply(x, self.weight, self.eps)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        sigmoid = gate.sigmoid()
        ctx.save_for_backward(gate_up, sigmoid)  # the exponential is the expensive part
        return (gate * sigmoid).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        gate_up, sigmoid = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, -1)
        silu = gate * sigmoid
        torch.mul(grad, silu, out=grad_up)
        # d silu / d gate = sigmoid + silu * (1 - sigmoid)
        slope = torch.addcmul(sigmoid + silu, silu, sigmoid, value=-1)
        torch.mul(slope.mul_(up), grad, out=grad_gate)
        return grad_gate_up


def swiglu(gate_up: Tensor) -> Tensor:
    """Return ``silu(gate) * up`` of ``[..., gate | up]``. Source: arXiv 2002.05202."""
    return _SwiGLU.apply(gate_up)
