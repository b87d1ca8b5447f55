"""TernGrad: three levels per coordinate, after clipping."""

import torch
from torch import Tensor

from lightning_n2uq.compression.base import check_gradient
from lightning_n2uq.compression.nuq import NUQCodec
from lightning_n2uq.compression.on_nuq import CodecOnNUQ
from lightning_n2uq.utils.validation import check_number


class TernGradCodec(CodecOnNUQ):
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
        self.inner = NUQCodec(bits=2, bucket_size=bucket_size, norm="linf", levels="uniform")

    def encode(self, x: Tensor, seed: int, out: Tensor | None = None) -> Tensor:
        """Clips and rounds; see `Codec.encode`."""
        return super().encode(self._clipped(check_gradient(x)), seed, out)

    def _clipped(self, x: Tensor) -> Tensor:
        whole = x.numel() // self.bucket_size * self.bucket_size
        parts = [x[:whole].view(-1, self.bucket_size), x[whole:].view(1, -1)]
        return torch.cat([self._clip_rows(part).view(-1) for part in parts if part.numel()] or [x])

    def _clip_rows(self, rows: Tensor) -> Tensor:
        """Returns the rows clipped; NaN stays, and a standard deviation beyond fp32 clips nothing."""
        reach = self.clip * (rows - rows.mean(dim=1, keepdim=True)).square().mean(dim=1, keepdim=True).sqrt()
        reach = torch.where(torch.isfinite(reach) & (reach > 0), reach, torch.inf)
        return torch.minimum(torch.maximum(rows, -reach), reach)

    def variance_bound(self) -> float:
        """Returns the bound of the rounding, or 1: what clipping takes away is at most that."""
        return max(1.0, super().variance_bound())

    def describe(self) -> str:
        """Returns every parameter in one line."""
        return f"terngrad(bucket_size={self.bucket_size}, clip={self.clip})"
