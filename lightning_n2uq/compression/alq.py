"""ALQ and AMQ: levels that follow the gradients."""

from collections.abc import Sequence
from typing import Literal, get_args

from torch import Tensor

from lightning_n2uq.compression.base import check_gradient
from lightning_n2uq.compression.magnitudes import BINS, Magnitudes, magnitude_histogram
from lightning_n2uq.compression.nuq import NUQCodec
from lightning_n2uq.compression.on_nuq import CodecOnNUQ
from lightning_n2uq.ops.formats.gradient_codec import Norm, NUQFormat
from lightning_n2uq.ops.gaussian_levels import descend
from lightning_n2uq.utils.validation import check, check_choice

Family = Literal["alq", "amq"]

_NEAREST = 1e-4  # levels do not come closer, relative to the higher one


class AdaptiveCodec(CodecOnNUQ):
    """NUQSGD with levels that are re-estimated from the gradients so that the expected variance is least.

    Implements Faghri et al., "Adaptive gradient quantization for data-parallel SGD", NeurIPS 2020 (arXiv
    2010.12460). `alq` moves every level by coordinate descent (section 3.1), `amq` fits one multiplier `p` of
    the levels `0, p^s, .., p, 1` (section 3.2). Where the paper fits a truncated normal distribution to the
    magnitudes `|v_i| / ||v||`, this takes their histogram, weighted by the squared norm of their buckets.

    Levels change only by `adapt` and by setting `levels`, which the exchange does on all ranks at the same
    step. Messages are those of `NUQCodec` with listed levels.

    Args:
        bits: The bits per coordinate, sign included: 3 or 4.
        bucket_size: The number of coordinates that share a norm.
        norm: The norm of a bucket, `l2` or `linf`.
        family: `alq` or `amq`.

    Raises:
        ValueError: If an argument is not allowed.
    """

    def __init__(
        self, bits: int = 4, bucket_size: int = 1024, norm: Norm = "l2", family: Family = "alq"
    ) -> None:
        check_choice("family", family, get_args(Family))
        check(bits in (3, 4), "bits", bits, f"are 3, 4 with method={family!r}; 2 bits have no level to move")
        self.family: Family = family
        self._form = NUQFormat(bits, bucket_size, norm)
        self.levels = self._form.levels

    @property
    def bits(self) -> int:
        """Returns the bits per coordinate."""
        return self._form.bits

    @property
    def levels(self) -> tuple[float, ...]:
        """The levels, ascending from 0 to 1."""
        return self._levels

    @levels.setter
    def levels(self, levels: Sequence[float]) -> None:
        self._levels = tuple(levels)
        self.inner = NUQCodec(self.bits, self._form.bucket_size, self._form.norm, self._levels)

    def observe(self, x: Tensor) -> Tensor:
        """Returns the weighted histogram of a gradient's magnitudes, fp64 `[BINS]`."""
        return magnitude_histogram(check_gradient(x), self._form.bucket_size, self._form.norm)

    def adapt(self, histogram: Tensor) -> None:
        """Moves the levels to where a histogram's expected variance is least; leaves them if it is empty.

        Args:
            histogram: The sum of what `observe` returned, fp64 `[BINS]`.
        """
        total = float(histogram.sum())
        if not 0 < total < float("inf") or histogram.numel() != BINS:
            return
        seen = Magnitudes(histogram / total)
        if self.family == "amq":
            self.levels = seen.best_multiples(len(self.levels) - 2)
        else:
            found = descend(list(self.levels), seen.share, seen.moment, seen.quantile)
            self.levels = _apart(found)

    def describe(self) -> str:
        """Returns the family and the present levels."""
        return f"{self.family}({self.inner.describe()})"


def _apart(levels: Sequence[float]) -> list[float]:
    """Returns the levels, moved where two of them would be the same in fp32."""
    apart = [float(level) for level in levels]
    for index in range(len(apart) - 2, 0, -1):
        apart[index] = min(apart[index], apart[index + 1] * (1 - _NEAREST))
    for index in range(1, len(apart) - 1):
        apart[index] = max(apart[index], apart[index - 1] * (1 + _NEAREST / 4), 2.0**-30 * index)
    return apart
