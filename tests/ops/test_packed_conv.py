"""`packed_conv2d` gives the bits of `conv2d` and keeps codes instead of floats."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_n2uq.ops.fused_activation import packed_activation
from lightning_n2uq.ops.fused_conv import Geometry, PackedInput, QuantizedWeight, packed_conv2d
from lightning_n2uq.ops.tables import QuantizerParameters
from lightning_n2uq.ops.weight import quantize_weight_with_scale

GEOMETRIES = [
    ((4, 6, 3, 3), Geometry((1, 1), (1, 1), (1, 1), 1)),
    ((4, 6, 1, 1), Geometry((2, 2), (0, 0), (1, 1), 1)),
    ((6, 1, 3, 3), Geometry((2, 1), (2, 0), (2, 1), 6)),
]


def setup(shape: tuple[int, ...], bits: int = 3) -> tuple[PackedInput, Tensor, Tensor, Tensor]:
    n = 2**bits - 1
    x = torch.randn(2, 6, 9, 11, requires_grad=True)
    scale_out = torch.tensor([0.7], requires_grad=True)
    quantizer = QuantizerParameters(torch.zeros(1), torch.full((n,), 2 / n), torch.ones(1), scale_out)
    y, packed, _ = packed_activation(x, None, None, quantizer, torch.float32)
    return PackedInput(y, packed, scale_out, bits), x, torch.randn(shape, requires_grad=True), scale_out


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("known_scale", [False, True])
@pytest.mark.parametrize("gradient", ["scaled", "straight_through"])
@pytest.mark.parametrize(("shape", "geometry"), GEOMETRIES)
def test_values_and_gradients_are_the_bits_of_the_plain_convolution(
    shape: tuple[int, ...], geometry: Geometry, gradient: str, known_scale: bool, with_bias: bool
) -> None:
    source, x, weight, scale_out = setup(shape)
    bias = torch.randn(shape[0], requires_grad=True) if with_bias else None
    with torch.no_grad():
        weight[1] = 0.0  # its scale is zero
    quantized, scale = quantize_weight_with_scale(weight, 2, gradient)
    known = QuantizedWeight(quantized, weight, scale, 2, gradient == "straight_through")
    kept = known if known_scale else QuantizedWeight(quantized)
    packed, plain = (
        packed_conv2d(source, kept, bias, geometry),
        F.conv2d(source.y, quantized, bias, *geometry),
    )
    assert torch.equal(packed, plain)
    leaves, grad = [x, weight, scale_out, *([bias] if with_bias else [])], torch.randn(plain.shape)
    for a, b in zip(
        torch.autograd.grad(packed, leaves, grad, retain_graph=True),
        torch.autograd.grad(plain, leaves, grad),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_codes_and_the_float_weight_are_all_that_is_kept() -> None:
    source, _, weight, _ = setup((4, 6, 3, 3))
    quantized, scale = quantize_weight_with_scale(weight, 2)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        packed_conv2d(source, QuantizedWeight(quantized, weight, scale, 2), None, GEOMETRIES[0][1])
    pointers = {t.untyped_storage().data_ptr() for t in kept}
    assert weight.untyped_storage().data_ptr() in pointers
    assert quantized.untyped_storage().data_ptr() not in pointers
    assert sum(t.nbytes for t in kept if t.data_ptr() != weight.data_ptr()) < source.y.nbytes / 8


def test_a_weight_changed_before_backward_is_noticed() -> None:
    source, _, weight, _ = setup((4, 6, 3, 3))
    quantized, scale = quantize_weight_with_scale(weight, 2)
    out = packed_conv2d(source, QuantizedWeight(quantized, weight, scale, 2), None, GEOMETRIES[0][1])
    with torch.no_grad():
        weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # opcheck reads it
@pytest.mark.parametrize("known_scale", [False, True])
def test_packed_conv_opcheck(known_scale: bool) -> None:
    source, _, weight, _ = setup((4, 6, 3, 3))
    quantized, scale = quantize_weight_with_scale(weight.detach(), 2)
    y, quantized = source.y.detach().requires_grad_(), quantized.requires_grad_(not known_scale)
    known = (weight, scale, 2, False) if known_scale else (None, None, 0, False)
    arguments = (
        y,
        source.packed,
        torch.tensor([0.7]),
        3,
        quantized,
        *known,
        torch.randn(4, requires_grad=True),
    )
    geometry = ([1, 1], [1, 1], [1, 1], 1)
    torch.library.opcheck(torch.ops.lightning_n2uq.packed_conv2d.default, (*arguments, *geometry))
