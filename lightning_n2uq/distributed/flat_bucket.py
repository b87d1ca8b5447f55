"""Tensors that no DDP has put into a bucket, as the exchange takes one of DDP's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class FlatBucket:
    """All of a step's gradients (or changes of weights) in one bucket.

    Attributes:
        followed: The parameters, in the order of the buffer.
        flat: The buffer, 1-D, which the mean replaces.
    """

    followed: Sequence[Tensor]
    flat: Tensor

    def index(self) -> int:
        """Returns the bucket's number."""
        return 0

    def is_last(self) -> bool:
        """Returns whether it is the step's last bucket."""
        return True

    def buffer(self) -> Tensor:
        """Returns the buffer."""
        return self.flat

    def parameters(self) -> Sequence[Tensor]:
        """Returns the parameters."""
        return self.followed

    def gradients(self) -> list[Tensor]:
        """Returns views of the buffer, one per parameter and in its shape."""
        pieces = self.flat.split([parameter.numel() for parameter in self.followed])
        return [piece.view(parameter.shape) for parameter, piece in zip(self.followed, pieces, strict=True)]
