"""TernGrad: three levels per coordinate, after clipping."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_n2uq.compression.base import Codec, check_gradient
from lightning_n2uq.compression.nuq import NUQCodec
from lightning_n2uq.utils.validation import check_number


class TernGradCodec(Codec):
    """Sends `-1`, `0` or `1` times the largest magnitude of the clipped bucket, in two bits.

    Implements Wen et al., "TernGrad", NeurIPS 2017 (arXiv 1705.07878), equations 2 to 6: coordinates beyond
    2.5 standard deviations are clipped, and the rest is rounded stochastically without bias. Clipping has a
    bias. The paper's layers are buckets here. The message is that of `NUQCodec(bits=2, norm="linf",
    levels="uniform")`.

    Args:
        bucket_size: The number of coordinates that are clipped alike and share a scale.
        clip: Where to clip, in standard deviations.

    Raises:
        ValueError: If an argument is not allowed.
    """

    def __init__(self, bucket_size: int = 1024, clip: float = 2.5) -> None:
        self.clip = check_number("clip", clip, 0.0, above=True)
        self._ternary = NUQCodec(bits=2, bucket_size=bucket_size, norm="linf", levels="uniform")

    @property
    def bucket_size(self) -> int:
        """Returns the number of coordinates per bucket."""
        return self._ternary.bucket_size

    def nbytes(self, numel: int) -> int:
        """Returns four bytes per bucket and two bits per coordinate."""
        return self._ternary.nbytes(numel)

    def encode(self, x: Tensor, seed: int, out: Tensor | None = None) -> Tensor:
        """Clips and rounds; see `Codec.encode`."""
        return self._ternary.encode(self._clipped(check_gradient(x)), seed, out)

    def _clipped(self, x: Tensor) -> Tensor:
        whole = x.numel() // self.bucket_size * self.bucket_size
        parts = [x[:whole].view(-1, self.bucket_size), x[whole:].view(1, -1)]
        return torch.cat([self._clip_rows(part).view(-1) for part in parts if part.numel()] or [x])

    def _clip_rows(self, rows: Tensor) -> Tensor:
        """Returns the rows clipped; NaN stays, and a standard deviation beyond fp32 clips nothing."""
        reach = self.clip * (rows - rows.mean(dim=1, keepdim=True)).square().mean(dim=1, keepdim=True).sqrt()
        reach = torch.where(torch.isfinite(reach) & (reach > 0), reach, torch.inf)
        return torch.minimum(torch.maximum(rows, -reach), reach)

    def decode(self, payload: Tensor, numel: int, out: Tensor | None = None) -> Tensor:
        """Unpacks and scales; see `Codec.decode`."""
        return self._ternary.decode(payload, numel, out)

    def decode_mean(
        self, payloads: Sequence[Tensor] | Tensor, numel: int, out: Tensor | None = None
    ) -> Tensor:
        """Decodes and averages in one pass; see `Codec.decode_mean`."""
        return self._ternary.decode_mean(payloads, numel, out)

    def variance_bound(self) -> float:
        """Returns the bound of the rounding, or 1: what clipping takes away is at most that."""
        return max(1.0, self._ternary.variance_bound())

    def describe(self) -> str:
        """Returns every parameter in one line."""
        return f"terngrad(bucket_size={self.bucket_size}, clip={self.clip})"
