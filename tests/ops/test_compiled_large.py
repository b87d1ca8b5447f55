"""Compiled kernels on tensors of more than 2^31 numbers: the last programs of a launch, emulated.

Memory that nobody touches is never taken, so the tensors cost little. The end of a large map has to be
treated as a small one is.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_n2uq.ops.dispatch import force
from lightning_n2uq.ops.formats.fused_activation import (
    ChannelGradients,
    NormParameters,
    PReLUParameters,
    Window,
)
from lightning_n2uq.ops.formats.gradient_codec import NUQFormat
from lightning_n2uq.ops.gradient_codec import nuq_decode_mean, nuq_encode
from lightning_n2uq.ops.tables import QuantizerParameters
from ptx_emulator.device import emulated_gpu

pytestmark = pytest.mark.compiled

NUMEL = 2**31 + 1_234_567
IMAGES, CHANNELS, SIDE = 8200, 64, 64  # of maps with more than 2^31 numbers
QUANTIZER = QuantizerParameters(
    torch.tensor([0.1]), torch.tensor([0.4, 0.6, 0.5]), torch.tensor([1.3]), torch.tensor([0.7])
)
SEEN = 1000  # numbers at the end, which the last programs write


def _large(numel: int, dtype: torch.dtype, end: Tensor) -> Tensor:
    try:
        values = torch.empty(numel, dtype=dtype)
        np.zeros(values.nbytes, np.uint8)  # as much again, for the emulator
    except (RuntimeError, MemoryError):  # the system promises no more than it has
        pytest.skip(f"no memory for {numel} numbers")
    values[-len(end) :] = end.to(dtype)
    return values


def _maps(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    """A large channels-last map, and its last image alone."""
    image = torch.randn(SIDE * SIDE * CHANNELS)
    flat = _large(IMAGES * image.numel(), dtype, image)
    large = flat.view(IMAGES, SIDE, SIDE, CHANNELS).permute(0, 3, 1, 2)
    return large, large[-1:].clone(memory_format=torch.channels_last)


def _end(values: Tensor) -> Tensor:
    """The last numbers in memory of a map, or of anything flat."""
    if values.dim() == 4:
        values = values.permute(0, 2, 3, 1)
    return values.reshape(-1)[-SEEN:]


def _same_end(large: list[Tensor], small: list[Tensor]) -> None:
    for one, other in zip(large, small, strict=True):
        assert torch.equal(_end(one).view(torch.uint8), _end(other).view(torch.uint8))


@pytest.fixture(autouse=True)
def many_short_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU of many more multiprocessors has them, so that the last ones are soon done."""
    pytest.importorskip("triton")
    from lightning_n2uq.ops.backends.triton import channels, threshold

    for module in (channels, threshold):
        monkeypatch.setattr(module, "MULTIPROCESSORS", 132 * 512)


def test_the_quantizer(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_n2uq.ops.backends.triton import threshold

    monkeypatch.setattr(threshold, "parameter_gradients", lambda *_: None)
    x = _large(NUMEL, torch.float16, torch.randn(8192))
    grad = _large(NUMEL, torch.float16, torch.randn(8192))

    def run(x: Tensor, grad: Tensor) -> list[Tensor]:
        y = threshold.forward(x, QUANTIZER, 0.0)
        dx, _ = threshold.backward(grad, x, QUANTIZER, 0.0)
        return [y, dx]

    with emulated_gpu(last=3):
        large = run(x, grad)
    with emulated_gpu():
        _same_end(large, run(x[-8192:].clone(), grad[-8192:].clone()))


@pytest.fixture
def norm(monkeypatch: pytest.MonkeyPatch) -> NormParameters:
    """A norm whose numbers are known, since sums over all programs are not to be had here."""
    from lightning_n2uq.ops.backends.triton import fused_activation, residual, stem

    zeros, ones = torch.zeros(CHANNELS), torch.ones(CHANNELS)
    table = torch.stack([torch.randn(CHANNELS), ones, 0.5 + torch.rand(CHANNELS), torch.randn(CHANNELS)])
    correction = 0.1 * torch.randn(2, CHANNELS)
    grads = ChannelGradients(*[zeros] * 5)
    for module in (residual, fused_activation, stem):
        monkeypatch.setattr(module, "measured_norm", lambda *_: (table[:2], table))
        monkeypatch.setattr(module, "known_norm", lambda *_: table)
        monkeypatch.setattr(module, "channel_gradients", lambda *_: (correction, grads))
    return NormParameters(ones, zeros, 1e-5)


def _act() -> PReLUParameters:
    return PReLUParameters(torch.randn(CHANNELS), torch.full((CHANNELS,), 0.25), torch.randn(CHANNELS))


def _check_maps(run: Callable[[Tensor, Tensor], list[Tensor]]) -> None:
    (x, x_small), (grad, grad_small) = _maps(), _maps()
    with emulated_gpu(last=2):
        large = run(x, grad)
    with emulated_gpu():
        _same_end(large, run(x_small, grad_small))


@pytest.mark.parametrize("behind_a_norm", [False, True])
def test_the_chain(norm: NormParameters, behind_a_norm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_n2uq.ops.backends.triton import fused_activation

    monkeypatch.setattr(fused_activation, "parameter_gradients", lambda *_: [None] * 4)
    affine, act = norm if behind_a_norm else None, _act()

    def run(x: Tensor, grad: Tensor) -> list[Tensor]:
        y, packed, stats = fused_activation.forward(x, affine, act, QUANTIZER, x.dtype)
        dx, *_ = fused_activation.backward(grad, x, packed, stats, affine, act, QUANTIZER)
        again = fused_activation.rebuild(packed, QUANTIZER.scale_out, 2, x.shape, x.dtype)
        return [y, dx, again, packed[: x.numel() // 4]]

    _check_maps(run)


@pytest.mark.parametrize("two_norms", [False, True])
def test_the_end_of_a_block(norm: NormParameters, two_norms: bool) -> None:
    from lightning_n2uq.ops.backends.triton import residual

    first, act = norm, _act()
    second = first if two_norms else None

    def run(x: Tensor, grad: Tensor) -> list[Tensor]:
        y, stats, other = residual.forward(x, first, grad, second, act)
        dx, dother, *_ = residual.backward(grad, x, stats, first, x, other, second, act)
        return [y, dx, dother]

    _check_maps(run)


def test_the_stem(norm: NormParameters) -> None:
    from lightning_n2uq.ops.backends.triton import stem

    window = Window(3, 1, 1)
    some = torch.full((1, CHANNELS, SIDE, SIDE), 4, dtype=torch.uint8)
    some[..., 1:-1, 1:-1] = torch.randint(9, (CHANNELS, SIDE - 2, SIDE - 2))

    def run(x: Tensor, grad: Tensor) -> list[Tensor]:
        y, taps, stats = stem.forward(x, norm, window)
        taps[-1:] = some  # windows that reach the last lines, but belong to earlier programs
        dx, *_ = stem.backward(grad, taps, x, stats, norm, window)
        return [y, dx]

    _check_maps(run)


def test_the_codec() -> None:
    pytest.importorskip("numba")
    form, x = NUQFormat(4, 1024), _large(NUMEL, torch.float32, torch.randn(8192))
    start, results = form.norm_bytes(NUMEL), []
    for kernel in ("numba", "triton"):
        message = torch.empty(form.nbytes(NUMEL), dtype=torch.uint8)
        with emulated_gpu(last=3), force(kernel):
            nuq_encode(x, form, 7, message)
        results.append([message[start - 8 : start], message])
    _same_end(*results)
    with emulated_gpu(last=3), force("triton"):
        mean = torch.empty_like(x)
        nuq_decode_mean(message[None], form, NUMEL, mean)
    place = torch.arange(NUMEL - SEEN, NUMEL)
    code = message[start + place // 2].int() >> 4 * (place % 2) & 15
    norms = message[:start].view(torch.float32)[place // 1024]
    assert torch.equal(_end(mean), form.signed_levels()[code] * norms)
