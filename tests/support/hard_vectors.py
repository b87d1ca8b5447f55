"""A gradient of everything that codecs find hard, and how two of its messages or means are compared."""

import torch
from torch import Tensor


def hard_vector(numel: int) -> Tensor:
    """All magnitudes, zeros, subnormals, non-finite entries, negative zeros."""
    generator = torch.Generator().manual_seed(numel)
    x = torch.randn(numel, generator=generator) * 10.0 ** torch.randint(-3, 4, (numel,), generator=generator)
    if numel > 400:
        x[5], x[6] = 0.0, -0.0
        x[64:128] = 0.0
        x[130], x[300] = float("inf"), float("nan")
        x[192:256] *= 1e-42
        x[320:384] *= 1e34
    return x


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal to the bit, any NaN like any other."""
    if one.dtype == torch.float32:
        one, other = (x.nan_to_num(nan=1.25, posinf=1.5, neginf=-1.5).view(torch.int32) for x in (one, other))
    return torch.equal(one, other)
