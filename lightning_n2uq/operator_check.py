"""Every operator once on a device, forward and backward, against the reference, for `n2uq doctor --check`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_n2uq.compression import NUQCodec
from lightning_n2uq.ops import integer_conv2d, integer_linear, quantize_weight, threshold_quantize
from lightning_n2uq.ops.dispatch import force
from lightning_n2uq.ops.formats.fused_activation import NormParameters, PReLUParameters, Window
from lightning_n2uq.ops.formats.rotated_codec import Rounding
from lightning_n2uq.ops.fused_activation import packed_activation
from lightning_n2uq.ops.residual import residual_activation
from lightning_n2uq.ops.stem import norm_relu_pool
from lightning_n2uq.ops.tables import QuantizerParameters

_EPS = 1e-5
_SHAPE = 4, 16, 14, 14
_SHARE, _ERROR = 2e-3, 2e-3  # of values that a norm's last bits may push over a threshold; of sums over them


class _Values:
    """Random inputs, the same on every device."""

    def __init__(self, device: str) -> None:
        self._generator, self._device = torch.Generator().manual_seed(0), device

    def normal(self, *shape: int, mean: float = 0.0, spread: float = 1.0) -> Tensor:
        drawn = torch.randn(shape, generator=self._generator) * spread + mean
        return drawn.to(self._device).requires_grad_()

    def channels(self, count: int) -> list[Tensor]:
        return [self.normal(_SHAPE[1], mean=0.5, spread=0.2) for _ in range(count)]

    def integers(self, largest: int, *shape: int) -> Tensor:
        return torch.randint(largest + 1, shape, generator=self._generator).to(self._device)

    def quantizer(self) -> QuantizerParameters:
        start, alpha, beta = (self.normal(1, mean=m, spread=0.0) for m in (0.0, 1.0, 1.0))
        return QuantizerParameters(start, self.normal(15, mean=2 / 15, spread=0.01), alpha, beta)


def _gradients(y: Tensor, *leaves: Tensor) -> list[Tensor]:
    return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]


def _threshold(values: _Values) -> list[Tensor]:
    x, quantizer = values.normal(8, 1000), values.quantizer()
    return _gradients(threshold_quantize(x, *quantizer), x, *quantizer)


def _weight(values: _Values) -> list[Tensor]:
    weight = values.normal(16, 8, 3, 3)
    return _gradients(quantize_weight(weight, 2), weight)


def _nuq(values: _Values) -> list[Tensor]:
    gradient, results = values.normal(5000).detach(), []
    for bits in (2, 3, 4, 8):
        codec = NUQCodec(bits=bits)
        payload = codec.encode(gradient, seed=1)
        results += [payload.float(), codec.decode(payload, gradient.numel())]
    return results


def _rotated(values: _Values) -> list[Tensor]:
    gradient, results = values.normal(5000).detach(), []
    forms: tuple[tuple[int, Rounding], ...] = ((4, "stochastic"), (2, "eden"))
    for bits, rounding in forms:
        codec = NUQCodec(bits=bits, rotation="hadamard", rounding=rounding)
        payload = codec.encode(gradient, seed=1)
        results += [payload.float(), codec.decode(payload, gradient.numel())]
    return results


def _chain(values: _Values) -> list[Tensor]:
    x, (gamma, beta, *act), quantizer = values.normal(*_SHAPE), values.channels(5), values.quantizer()
    norm, prelu = NormParameters(gamma, beta, _EPS), PReLUParameters(*act)
    y, _, _ = packed_activation(x, norm, prelu, quantizer, torch.float32)
    return _gradients(y, x, gamma, beta, *act, *quantizer)


def _residual(values: _Values) -> list[Tensor]:
    x, other, (gamma, beta, *act) = values.normal(*_SHAPE), values.normal(*_SHAPE), values.channels(5)
    norm, prelu = NormParameters(gamma, beta, _EPS), PReLUParameters(*act)
    y, _, _ = residual_activation(x, norm, other, None, prelu)
    return _gradients(y, x, other, gamma, beta, *act)


def _stem(values: _Values) -> list[Tensor]:
    x, (gamma, beta) = values.normal(*_SHAPE), values.channels(2)
    y, _ = norm_relu_pool(x, NormParameters(gamma, beta, _EPS), Window(3, 2, 1))
    return _gradients(y, x, gamma, beta)


def _integer(values: _Values) -> list[Tensor]:
    codes, levels = values.integers(15, *_SHAPE).to(torch.uint8), values.integers(15, 8, _SHAPE[1], 3, 3)
    scale, flat = values.channels(1)[0].detach()[:8].abs(), codes.flatten(2)
    limits: dict[str, Any] = {"largest_code": 15, "largest_level": 15}
    mapped = integer_conv2d(codes, levels.to(torch.int8), scale, padding=1, **limits)
    rows = values.integers(15, 8, flat.shape[-1]).to(torch.int8)
    return [mapped, integer_linear(flat, rows, scale, **limits)]


CHECKS: dict[str, Callable[[_Values], list[Tensor]]] = {
    "integer": _integer,
    "nuq": _nuq,
    "packed_activation": _chain,
    "quantize_weight": _weight,
    "residual_block": _residual,
    "rotated": _rotated,
    "stem": _stem,
    "threshold_quantize": _threshold,
}
_EXACT = {
    "integer": 2,
    "nuq": 8,
    "quantize_weight": 2,
    "threshold_quantize": 2,
}  # how many results are the same bits


def compare(name: str, device: str) -> None:
    """Runs an operator by the kernels in use and by the reference.

    Args:
        name: One of `CHECKS`.
        device: `cpu` or `cuda`.

    Raises:
        ValueError: If the results differ by more than a norm's last bits and the order of sums explain.
    """
    results = []
    for kernels in (None, "reference"):
        with force(kernels):
            results.append(CHECKS[name](_Values(device)))
    for i, (found, expected) in enumerate(zip(*results, strict=True)):
        if i < _EXACT.get(name, 0):
            same = torch.equal(found, expected)
        else:
            far = (found - expected).abs() > _ERROR * expected.abs().max().clamp(min=1.0)
            same = bool(far.float().mean() <= _SHARE and found.isfinite().all())
        if not same:
            raise ValueError(f"result {i} of the kernels is not the reference's")
