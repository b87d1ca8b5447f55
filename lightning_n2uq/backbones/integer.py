"""Options of integer-only networks: what they may be combined with, and the layers that they ask for.

`residual_bits` puts the maps between blocks on grids (both branches of a sum on a shared one),
`first_last_bits` quantizes the first and the last layer. With both, every tensor between image and logits is
an integer times a step, and so is the exported network (docs/deployment.md).
"""

from __future__ import annotations

from torch import Tensor, nn

from lightning_n2uq.layers import GridSpec, QuantConv2d, QuantLinear, QuantSpec
from lightning_n2uq.quantizers import UniformGrid
from lightning_n2uq.utils.validation import check

GRID_BITS = 8
INTEGER_OPTIONS = ("residual_bits", "first_last_bits")
_ACTIVATIONS = ("n2uq", "n2uq_fixed", "lsq", "pact", "dorefa", "ewgs")
_WEIGHTS = (
    "n2uq", "lsq", "lsq_plus", "dorefa", "ewgs", "statsq", "least_error", "seq", "seq_ternary", "ternary",
    "binary",
)  # fmt: skip


def grid_bits(name: str, bits: int | None) -> int | None:
    """Returns the bits of one of the two options, None where it is off (0 or None).

    Raises:
        ValueError: The value is another one than None, 0 or 8.
    """
    check(bits in (None, 0, GRID_BITS) and not isinstance(bits, bool), name, bits, "are null, 0 and 8")
    return bits or None


def check_residual(bits: int | None, spec: QuantSpec, quantize_downsample: bool = True) -> int | None:
    """Returns `residual_bits` as `grid_bits` does.

    Args:
        bits: The option's value.
        spec: Methods of the blocks, whose levels have to be integers times a step.
        quantize_downsample: Whether the shortcuts' convolutions are quantized.

    Raises:
        ValueError: The value is not allowed, or something in a block has no integers.
    """
    bits = grid_bits("residual_bits", bits)
    if bits is None:
        return None
    for kind, allowed in (("activation", _ACTIVATIONS), ("weight", _WEIGHTS)):
        name = getattr(spec, f"{kind}_quantizer")
        options = f"with residual_bits {bits} are {', '.join(allowed)}"
        check(name in allowed, f"{kind}_quantizer", name, options)
    check(
        quantize_downsample, "quantize_downsample", quantize_downsample, f"with residual_bits {bits} is true"
    )
    return bits


def first_conv(bits: int | None, inputs: int, outputs: int, kernel: int, stride: int) -> nn.Conv2d:
    """Returns the first convolution, without bias: in full precision, or with `first_last_bits`."""
    arguments = {"padding": kernel // 2, "bias": False}
    if bits is None:
        return nn.Conv2d(inputs, outputs, kernel, stride, **arguments)  # type: ignore[arg-type]
    return QuantConv2d(inputs, outputs, kernel, stride, spec=GridSpec(bits, bits), **arguments)  # type: ignore[arg-type]


def last_linear(bits: int | None, inputs: int, outputs: int) -> nn.Linear:
    """Returns the last layer: in full precision, or with `first_last_bits`."""
    if bits is None:
        return nn.Linear(inputs, outputs)
    return QuantLinear(inputs, outputs, spec=GridSpec(bits, bits))


def unsigned_grid(bits: int | None) -> UniformGrid | None:
    """Returns the grid of a map without negative values, or None."""
    return None if bits is None else UniformGrid(bits, signed=False)


def run_layer(layer: nn.Conv2d | nn.Linear, x: Tensor) -> Tensor:
    """Runs the first or the last layer of a network whose maps are on grids; evaluation is in float64.

    A quantized layer takes float64 maps as integers, one in full precision takes them in its own dtype.
    """
    if layer.training:
        return layer(x)  # type: ignore[no-any-return]
    quantized = isinstance(layer, QuantConv2d | QuantLinear)
    y: Tensor = layer(x.double() if quantized else x.to(layer.weight.dtype))
    return y.double()
