"""A residual block's end and the stem as operators: against plain layers, kernels against the reference."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_n2uq.ops.dispatch import force
from lightning_n2uq.ops.formats.fused_activation import NormParameters, PReLUParameters, Window
from lightning_n2uq.ops.residual import residual_activation
from lightning_n2uq.ops.stem import norm_relu_pool

pytest.importorskip("numba")


def norm(channels: int) -> list[Tensor]:
    return [(torch.rand(channels) + 0.5).requires_grad_(), torch.randn(channels).requires_grad_()]


def affine(channels: int) -> NormParameters:
    return NormParameters(*norm(channels), 1e-5)


def batch_norm(x: Tensor, parameters: list[Tensor], eps: float) -> Tensor:
    return F.batch_norm(x, None, None, *parameters, training=True, eps=eps)


def check(fused, plain, leaves: list[Tensor], exact: int) -> None:
    """Kernel equal to the reference (the first `exact` results bit for bit), both close to plain layers."""
    grad, results = torch.randn(plain().shape), []
    for kernels, function in (("reference", fused), ("numba", fused), ("numba", plain)):
        with force(kernels):
            y = function()
            results.append([y, *torch.autograd.grad(y, leaves, grad)])
    for i, (slow, fast, expected) in enumerate(zip(*results, strict=True)):
        if i < exact:
            assert torch.equal(slow, fast)
        torch.testing.assert_close(slow, fast, rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(fast, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (3, 4, 28, 28), (2, 2, 1, 3), (12, 3, 7, 7)])
@pytest.mark.parametrize("second", [False, True])
def test_residual_end(shape: tuple[int, ...], second: bool) -> None:
    x, other = torch.randn(shape, requires_grad=True), torch.randn(shape, requires_grad=True)
    channels = shape[1]
    first, other_norm = norm(channels), norm(channels) if second else []
    act = PReLUParameters(*(torch.rand(channels, requires_grad=True) for _ in range(3)))

    def plain() -> Tensor:
        total = batch_norm(x, first, 1e-5) + (batch_norm(other, other_norm, 1e-3) if second else other)
        return F.prelu(total + act[0].view(-1, 1, 1), act[1]) + act[2].view(-1, 1, 1)

    def fused() -> Tensor:
        shortcut_norm = NormParameters(*other_norm, 1e-3) if second else None
        return residual_activation(x, NormParameters(*first, 1e-5), other, shortcut_norm, act)[0]

    check(fused, plain, [x, other, *first, *other_norm, *act], exact=3)


@pytest.mark.parametrize("shape", [(2, 3, 13, 17), (3, 4, 28, 28), (2, 2, 3, 3)])
@pytest.mark.parametrize("window", [(3, 2, 1), (2, 2, 0), (3, 1, 1)])
def test_stem(shape: tuple[int, ...], window: tuple[int, int, int]) -> None:
    x, parameters = torch.randn(shape, requires_grad=True), norm(shape[1])

    def plain() -> Tensor:
        return F.max_pool2d(F.relu(batch_norm(x, parameters, 1e-5)), *window)

    def fused() -> Tensor:
        return norm_relu_pool(x, NormParameters(*parameters, 1e-5), Window(*window))[0]

    check(fused, plain, [x, *parameters], exact=2)


def test_nan_stays_visible() -> None:
    x = torch.randn(2, 3, 8, 8)
    x[0, 1, 2, 2] = torch.nan
    y, stats = norm_relu_pool(x, affine(3), Window(3, 2, 1))
    assert y[:, 1].isnan().all()
    assert stats[:, 1].isnan().all()
    assert y[:, [0, 2]].isfinite().all()


def test_statistics_come_with_the_result() -> None:
    x, other = torch.randn(4, 3, 6, 6), torch.randn(4, 3, 6, 6) * 3 + 1
    act = PReLUParameters(*torch.rand(3, 3))
    _, stats, other_stats = residual_activation(x, affine(3), other, affine(3), act)
    for value, source in ((stats, x), (other_stats, other)):
        variance, mean = torch.var_mean(source, (0, 2, 3), correction=0)
        torch.testing.assert_close(value, torch.stack([mean, variance]))


def test_three_maps_are_kept_by_neither() -> None:
    x, other = torch.randn(2, 4, 8, 8, requires_grad=True), torch.randn(2, 4, 8, 8, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        residual_activation(x, affine(4), other, None, PReLUParameters(*torch.rand(3, 4)))
        norm_relu_pool(x, affine(4), Window(3, 2, 1))
    maps = {t.data_ptr() for t in kept if t.dtype == torch.float32 and t.numel() == x.numel()}
    assert maps == {x.data_ptr(), other.data_ptr()}


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # opcheck reads it
def test_block_opcheck() -> None:
    x, other = torch.randn(2, 3, 6, 6, requires_grad=True), torch.randn(2, 3, 6, 6, requires_grad=True)
    act = [torch.rand(3, requires_grad=True) for _ in range(3)]
    ops = torch.ops.lightning_n2uq
    torch.library.opcheck(ops.norm_relu_pool.default, (x, *norm(3), 1e-5, 3, 2, 1))
    for second in ((None, None), norm(3)):
        arguments = (x, *norm(3), 1e-5, other, *second, 1e-3, *act)
        torch.library.opcheck(ops.residual_activation.default, arguments)
