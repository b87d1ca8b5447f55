"""Entropy coding of packed messages: the interface and the choice."""

import abc
from typing import Literal

from torch import Tensor

from lightning_n2uq.ops.nuq_format import NUQFormat

Coding = Literal["packed", "huffman", "ans"]
CODINGS = ("packed", "huffman", "ans")


class Coder(abc.ABC):
    """Turns a packed message into a shorter one and back, without loss."""

    @abc.abstractmethod
    def max_bytes(self, packed_bytes: int) -> int:
        """Upper bound of a message's size, given the size of the packed one."""

    @abc.abstractmethod
    def compress(self, packed: Tensor, numel: int, out: Tensor) -> Tensor:
        """Writes the coded message to the front of `out` and returns that part."""

    @abc.abstractmethod
    def expand(self, message: Tensor, numel: int) -> Tensor:
        """The packed message; ValueError if `message` is malformed."""


def make_coder(coding: str, form: NUQFormat) -> Coder | None:
    """The coder of a name, None for `packed`.

    Raises:
        ValueError: If the name is unknown or the coder's package is not installed.
    """
    if coding not in CODINGS:
        raise ValueError(f"coding must be one of {', '.join(CODINGS)}, got {coding!r}.")
    if coding == "packed":
        return None
    from lightning_n2uq.compression.entropy import EntropyCoder

    return EntropyCoder(coding, form)
