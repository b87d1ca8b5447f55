"""The fused operators of a residual network one by one, for `python -m benchmarks.gpu operators`.

Each is timed forward and backward on the maps of a ResNet-18's first stage, in bfloat16 and channels-last,
against the time of the bytes it has to move: maps count once per pass over them (a norm needs its sums before
its output, so that there are two), packed codes and the places of maxima by their bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_n2uq.ops.formats.fused_activation import NormParameters, PReLUParameters, Window
from lightning_n2uq.ops.fused_activation import packed_activation
from lightning_n2uq.ops.residual import residual_activation
from lightning_n2uq.ops.stem import norm_relu_pool
from lightning_n2uq.ops.tables import QuantizerParameters

EPS = 1e-5
DTYPE = torch.bfloat16


class Operator(NamedTuple):
    """What is called, and how many maps (of the input's size) each pass moves.

    Attributes:
        run: from the input to the output, and the tensors whose gradients are wanted.
        forward: maps read and written by the forward pass.
        backward: by the backward pass.
        scale: height and width of the input over those of `shape`.
    """

    run: Callable[[Tensor], tuple[Tensor, list[Tensor]]]
    forward: float
    backward: float
    scale: int = 1


def operators(shape: tuple[int, int, int, int], device: torch.device) -> dict[str, Operator]:
    """The operators, by name, for maps of a shape."""
    found, channels = {}, shape[1]
    for bits in (2, 4):
        codes = bits / 8 / DTYPE.itemsize
        for normed in (False, True):
            name = f"chain{' behind a norm' if normed else ''}, {bits} bits"
            moved = (3 + codes, 5 + 2 * codes) if normed else (2 + codes, 3 + codes)
            found[name] = Operator(_chain(channels, bits, normed, device), *moved)
    found["block's end"] = Operator(_residual(_map(shape, device)), 4, 8)
    pooled = (1 + 1 / DTYPE.itemsize) / 4  # a map of a quarter, and a byte per value
    found["stem"] = Operator(_stem(channels, device), 2 + pooled, 3 + 2 * pooled, 2)
    return found


def _map(shape: tuple[int, ...], device: torch.device) -> Tensor:
    values = torch.randn(shape, device=device, dtype=DTYPE)
    return values.contiguous(memory_format=torch.channels_last).requires_grad_()


def _parameters(count: int, channels: int, device: torch.device) -> list[Tensor]:
    return [(1 + 0.1 * torch.randn(channels, device=device)).requires_grad_() for _ in range(count)]


def _quantizer(bits: int, device: torch.device) -> QuantizerParameters:
    n = 2**bits - 1
    start, alpha, beta = (torch.full((1,), v, device=device).requires_grad_() for v in (0.0, 1.0, 1.0))
    widths = torch.full((n,), 2 / n, device=device).requires_grad_()
    return QuantizerParameters(start, widths, alpha, beta)


def _chain(
    channels: int, bits: int, normed: bool, device: torch.device
) -> Callable[[Tensor], tuple[Tensor, list[Tensor]]]:
    gamma, beta, *act = _parameters(5, channels, device)
    values = _quantizer(bits, device)
    norm = NormParameters(gamma, beta, EPS) if normed else None

    def run(x: Tensor) -> tuple[Tensor, list[Tensor]]:
        y, _, _ = packed_activation(x, norm, PReLUParameters(*act), values, DTYPE)
        return y, [x, *(norm or ())[:2], *act, *values]

    return run


def _residual(other: Tensor) -> Callable[[Tensor], tuple[Tensor, list[Tensor]]]:
    gamma, beta, *act = _parameters(5, other.shape[1], other.device)

    def run(x: Tensor) -> tuple[Tensor, list[Tensor]]:
        y, _, _ = residual_activation(x, NormParameters(gamma, beta, EPS), other, None, PReLUParameters(*act))
        return y, [x, other, gamma, beta, *act]

    return run


def _stem(channels: int, device: torch.device) -> Callable[[Tensor], tuple[Tensor, list[Tensor]]]:
    gamma, beta = _parameters(2, channels, device)

    def run(x: Tensor) -> tuple[Tensor, list[Tensor]]:
        norm = NormParameters(gamma, beta, EPS)
        return norm_relu_pool(x, norm, Window(3, 2, 1))[0], [x, gamma, beta]

    return run


def passes(
    operator: Operator, shape: tuple[int, int, int, int], device: torch.device
) -> dict[str, tuple[Callable[[], object], float]]:
    """The forward and the backward pass as calls, and the bytes that each has to move."""
    batch, channels, height, width = shape
    size = batch, channels, height * operator.scale, width * operator.scale
    x = _map(size, device)
    y, leaves = operator.run(x)
    grad = torch.randn_like(y)
    bytes_of_map = x.numel() * DTYPE.itemsize
    return {
        "forward": (lambda: operator.run(x)[0], operator.forward * bytes_of_map),
        "backward": (
            lambda: torch.autograd.grad(y, leaves, grad, retain_graph=True),
            operator.backward * bytes_of_map,
        ),
    }
