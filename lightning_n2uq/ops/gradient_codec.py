"""Encoding and decoding of gradient messages by whichever backend `lightning_n2uq.ops.dispatch` selects.

These functions trust their arguments (shapes, dtypes and sizes are validated by
`lightning_n2uq.compression`); all backends give the same bytes.
"""

from torch import Tensor

from lightning_n2uq.ops.dispatch import load
from lightning_n2uq.ops.formats.gradient_codec import NUQFormat
from lightning_n2uq.ops.formats.rotated_codec import RotatedFormat

OP = "nuq"
ROTATED = "rotated"


def nuq_encode(x: Tensor, form: NUQFormat, seed: int, out: Tensor) -> None:
    """Encodes `x` into `out`.

    Args:
        x: The gradient, contiguous, 1-D, fp32.
        form: The message format.
        seed: The seed of the message's random numbers.
        out: The message, contiguous uint8 `[form.nbytes(x.numel())]` on the same device; overwritten.
    """
    if x.numel():
        load(OP, x.device).encode(x, form, seed, out)


def nuq_decode_mean(payloads: Tensor, form: NUQFormat, numel: int, out: Tensor) -> None:
    """Decodes `W` messages and averages them into `out`: fp32 sum in row order, divided by `W`.

    Args:
        payloads: The messages, uint8 `[W, form.nbytes(numel)]`, rows contiguous.
        form: The message format.
        numel: The number of coordinates.
        out: The mean, contiguous fp32 `[numel]` on the same device; overwritten.
    """
    if numel:
        load(OP, payloads.device).decode_mean(payloads, form, numel, out)


def rotated_encode(x: Tensor, form: RotatedFormat, seed: int, out: Tensor) -> None:
    """Rotates and encodes `x` into `out`; arguments as of `nuq_encode`."""
    if x.numel():
        load(ROTATED, x.device).encode(x, form, seed, out)


def rotated_decode_mean(payloads: Tensor, form: RotatedFormat, numel: int, out: Tensor) -> None:
    """Decodes `W` rotated messages and averages them into `out`; arguments as of `nuq_decode_mean`."""
    if numel:
        load(ROTATED, payloads.device).decode_mean(payloads, form, numel, out)
