"""What codecs share whose messages are those of `NUQCodec`."""

from collections.abc import Sequence

from torch import Tensor

from lightning_n2uq.compression.base import Codec
from lightning_n2uq.compression.nuq import NUQCodec


class CodecOnNUQ(Codec):
    """A codec that prepares gradients or chooses levels, and leaves the messages to an `NUQCodec`.

    Attributes:
        inner: The codec of the messages.
    """

    inner: NUQCodec

    @property
    def bucket_size(self) -> int:
        """Returns the number of coordinates per bucket."""
        return self.inner.bucket_size

    def nbytes(self, numel: int) -> int:
        """Returns the bytes of a message; see `Codec.nbytes`."""
        return self.inner.nbytes(numel)

    def encode(self, x: Tensor, seed: int, out: Tensor | None = None) -> Tensor:
        """Quantizes and packs; see `Codec.encode`."""
        return self.inner.encode(x, seed, out)

    def decode(self, payload: Tensor, numel: int, out: Tensor | None = None) -> Tensor:
        """Unpacks and scales; see `Codec.decode`."""
        return self.inner.decode(payload, numel, out)

    def decode_mean(
        self, payloads: Sequence[Tensor] | Tensor, numel: int, out: Tensor | None = None
    ) -> Tensor:
        """Decodes and averages in one pass; see `Codec.decode_mean`."""
        return self.inner.decode_mean(payloads, numel, out)

    def variance_bound(self) -> float:
        """Returns the bound of the inner codec."""
        return self.inner.variance_bound()
