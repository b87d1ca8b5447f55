"""The activation quantizer in plain torch, with the functions that every backend has."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_n2uq.ops import reference
from lightning_n2uq.ops.tables import (
    QuantizerParameters,
    compute_dtype,
    operator_tables,
    parameter_gradients,
)


def forward(x: Tensor, quantizer: QuantizerParameters, ramp: float) -> Tensor:
    """Returns the quantized `x`: dtype, shape and memory format of `x`.

    Args:
        x: The input, of any shape and floating dtype.
        quantizer: The parameters.
        ramp: The ramp width, 0 for the staircase, up to 1 for the surrogate.
    """
    return torch.empty_like(x).copy_(reference.threshold_quantize(x, *quantizer, ramp))


def backward(
    grad: Tensor, x: Tensor, quantizer: QuantizerParameters, ramp: float
) -> tuple[Tensor, QuantizerParameters]:
    """Returns the gradients of `x` (its dtype, shape and memory format) and of the parameters.

    Args:
        grad: The upstream gradient, shape of `x`.
        x: The input of the forward pass.
        quantizer: The parameters of the forward pass.
        ramp: The ramp width of the forward pass.
    """
    tables = operator_tables(quantizer, compute_dtype(x.dtype), ramp)
    dx = torch.empty_like(x)
    dx.copy_(reference.threshold_input_gradient(grad, x, tables, quantizer.scale_out))
    sums, value_sum = reference.threshold_segment_sums(grad, x, tables)
    return dx, parameter_gradients(sums, value_sum, quantizer)
