"""Signs in a message: one bit per coordinate, eight per byte, the lowest bit first."""

import torch
from torch import Tensor


def join_bits(bits: Tensor) -> Tensor:
    """Returns uint8 `[ceil(n / 8)]` of booleans `[n]`; unused bits of the last byte are 0."""
    padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, -bits.numel() % 8)).view(-1, 8)
    return (padded << _places(bits)).sum(dim=1, dtype=torch.uint8)


def split_bits(packed: Tensor, numel: int) -> Tensor:
    """Returns the first `numel` bits, booleans, of what `join_bits` has joined."""
    return ((packed.unsqueeze(1) >> _places(packed)) & 1).view(-1)[:numel].bool()


def _places(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device)
