"""From what a user writes (`levels="exponential"`, `"uniform"`, a list ..) to a wire format."""

from collections.abc import Sequence

from lightning_n2uq.compression.theory import best_mantissa_bits
from lightning_n2uq.ops.formats.gradient_codec import Norm, NUQFormat

FAMILIES = ("exponential", "uniform", "float")


def make_format(
    bits: int,
    bucket_size: int,
    norm: Norm,
    levels: str | Sequence[float],
    mantissa_bits: int | None,
) -> NUQFormat:
    """Builds the wire format.

    Args:
        bits: The bits per code, sign included.
        bucket_size: The number of coordinates per bucket.
        norm: The norm of a bucket, `l2` or `linf`.
        levels: The levels: `exponential` (NUQSGD: `0, 2^-s, .., 1/2, 1`), `uniform` (QSGD), `float` (levels
            `2^-j (1 + k/2^m)`) or `2**(bits - 1)` ascending numbers from 0 to 1.
        mantissa_bits: The number `m` of the float levels; None takes the one with the smallest variance
            bound.

    Raises:
        ValueError: If an argument is not allowed.
    """
    if not isinstance(levels, str):
        _refuse_mantissa(mantissa_bits, "listed levels")
        return NUQFormat(bits, bucket_size, norm, "table", 0, tuple(float(level) for level in levels))
    if levels not in FAMILIES:
        raise ValueError(f"levels must be one of {', '.join(FAMILIES)} or a list of numbers, got {levels!r}.")
    if levels == "float":
        NUQFormat(bits, bucket_size, norm)  # validates before the search below
        m = best_mantissa_bits(bits, bucket_size, norm) if mantissa_bits is None else mantissa_bits
        return NUQFormat(bits, bucket_size, norm, "float", m)
    _refuse_mantissa(mantissa_bits, f"{levels} levels")
    return NUQFormat(bits, bucket_size, norm, "float" if levels == "exponential" else "uniform")


def _refuse_mantissa(mantissa_bits: int | None, what: str) -> None:
    if mantissa_bits not in (None, 0):
        raise ValueError(
            f"mantissa_bits must be None for {what} (use levels='float'), got {mantissa_bits!r}."
        )
