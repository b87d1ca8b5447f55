"""Integer convolution and linear layer by oneDNN: sums in int32, rounded once to float32, times the scale.

Its results have the bits of `reference.integer` wherever `obstacle` has nothing to say. oneDNN writes
channels-last maps, and quickly in bfloat16 only where the processor rounds to it; elsewhere float32 is cast.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_n2uq.ops.formats.integer import IntegerRange, Prepared
from lightning_n2uq.utils import processor
from lightning_n2uq.utils.compat import IntegerOperators, integer_operators

_LARGEST_INT16, _LARGEST_INT32 = 2**15 - 1, 2**31 - 1
_PLAIN: tuple[str, list[float], str] = "none", [], ""  # what follows the convolution: nothing


def obstacle(size: IntegerRange) -> str | None:
    """Returns why the sums could leave the accumulators, or None.

    Without VNNI products are added in pairs, in 16 bits that saturate.
    """
    if size.code * size.level * size.terms > _LARGEST_INT32:
        return f"sums of {size.terms} products up to {size.code} x {size.level} exceed 32 bits"
    if 2 * size.code * size.level > _LARGEST_INT16 and not processor.adds_bytes_exactly():
        return f"two products up to {size.code} x {size.level} exceed 16 bits, and this processor has no VNNI"
    return None


def prepare_conv2d(
    levels: Tensor, scale: Tensor, geometry: tuple[Sequence[int], ...], groups: int
) -> Prepared:
    """Returns the weight in oneDNN's own layout, which depends on no scale; reading them all takes time."""
    packed = _operators().pack_conv(levels, torch.ones(1), 1.0, 0, *geometry, groups)
    return Prepared(packed, scale)


def conv2d(
    codes: Tensor, weight: Prepared, geometry: tuple[Sequence[int], ...], groups: int, dtype: torch.dtype
) -> Tensor:
    """Returns `scale` times the convolution of codes and levels, channels-last, `dtype` or float32."""
    return _operators().conv(
        codes, 1.0, 0, weight.packed, weight.scale, _zeros(weight.scale), None, *geometry, groups,
        1.0, 0, _written(dtype), *_PLAIN,
    )  # fmt: skip


def prepare_linear(levels: Tensor, scale: Tensor) -> Prepared:
    """Returns the weight in oneDNN's own layout."""
    return Prepared(_operators().pack_linear(levels, None), scale)


def linear(codes: Tensor, weight: Prepared, dtype: torch.dtype) -> Tensor:
    """Returns `scale` times the product of codes `[rows, in]` and levels, `dtype` or float32."""
    return _operators().linear(
        codes, 1.0, 0, weight.packed, weight.scale, _zeros(weight.scale), None,
        1.0, 0, _written(dtype), *_PLAIN,
    )  # fmt: skip


def _written(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.bfloat16 and processor.writes_bfloat16() else torch.float32


def _zeros(scale: Tensor) -> Tensor:
    return torch.zeros(scale.numel(), dtype=torch.int64)


def _operators() -> IntegerOperators:
    operators = integer_operators()
    assert operators is not None  # `dispatch` has made sure
    return operators
