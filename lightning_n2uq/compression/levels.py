"""From what a user writes (`levels="exponential"`, `"uniform"`, a list ..) to a wire format."""

from collections.abc import Sequence
from typing import Literal

from lightning_n2uq.compression.theory import best_mantissa_bits
from lightning_n2uq.ops.formats.gradient_codec import Norm, NUQFormat
from lightning_n2uq.ops.formats.rotated_codec import RotatedFormat, Rounding
from lightning_n2uq.utils.validation import check, check_choice

FAMILIES = ("exponential", "uniform", "float")
ROTATIONS = ("none", "hadamard")

Rotation = Literal["none", "hadamard"]


def make_format(
    bits: int,
    bucket_size: int,
    norm: Norm,
    levels: str | Sequence[float],
    mantissa_bits: int | None,
    rounding: Rounding = "stochastic",
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
        rounding: Has to be `stochastic`: nearest levels need rotated buckets.

    Raises:
        ValueError: If an argument is not allowed.
    """
    check(rounding == "stochastic", "rounding", rounding, "is 'stochastic' without rotation='hadamard'")
    if not isinstance(levels, str):
        _refuse_mantissa(mantissa_bits, "listed levels")
        return NUQFormat(bits, bucket_size, norm, "table", 0, tuple(float(level) for level in levels))
    check(levels != "gaussian", "levels", levels, "with rotation='hadamard' only")
    if levels not in FAMILIES:
        raise ValueError(f"levels must be one of {', '.join(FAMILIES)} or a list of numbers, got {levels!r}.")
    if levels == "float":
        NUQFormat(bits, bucket_size, norm)  # validates before the search below
        m = best_mantissa_bits(bits, bucket_size, norm) if mantissa_bits is None else mantissa_bits
        return NUQFormat(bits, bucket_size, norm, "float", m)
    _refuse_mantissa(mantissa_bits, f"{levels} levels")
    return NUQFormat(bits, bucket_size, norm, "float" if levels == "exponential" else "uniform")


def make_rotated_format(
    bits: int,
    bucket_size: int,
    norm: Norm,
    levels: str | Sequence[float] | None,
    mantissa_bits: int | None,
    rotation: str,
    rounding: Rounding,
) -> RotatedFormat:
    """Builds the wire format of rotated buckets.

    Args:
        bits: The bits per code, sign included, 1 to 4.
        bucket_size: The number of coordinates per bucket, a power of two.
        norm: Has to be `l2`: rotated buckets are scaled otherwise.
        levels: Has to be `gaussian`, or None.
        mantissa_bits: Has to be None.
        rotation: Has to be `hadamard`.
        rounding: `stochastic` or `eden`.

    Raises:
        ValueError: If an argument is not allowed.
    """
    check_choice("rotation", rotation, ROTATIONS)
    check(levels in (None, "gaussian"), "levels", levels, f"is 'gaussian' with rotation={rotation!r}")
    check(norm == "l2", "norm", norm, f"is 'l2' with rotation={rotation!r}, which does not use it")
    _refuse_mantissa(mantissa_bits, "gaussian levels")
    return RotatedFormat(bits, bucket_size, rounding)


def _refuse_mantissa(mantissa_bits: int | None, what: str) -> None:
    if mantissa_bits not in (None, 0):
        raise ValueError(
            f"mantissa_bits must be None for {what} (use levels='float'), got {mantissa_bits!r}."
        )
