"""What the integer operators and their backends hand each other."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class IntegerRange(NamedTuple):
    """What a sum of products can grow to.

    Attributes:
        code: The largest code that occurs.
        level: The largest magnitude of a level that occurs.
        terms: The number of products in a sum.
    """

    code: int
    level: int
    terms: int


class Prepared(NamedTuple):
    """A layer's weight as a backend wants it.

    Attributes:
        packed: The levels in the backend's own layout; opaque.
        scale: One scale per output channel, `[C_out]` float32.
    """

    packed: Tensor
    scale: Tensor
