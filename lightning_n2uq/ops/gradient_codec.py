"""Encoding and decoding of gradient messages by whichever kernel `lightning_n2uq.ops.dispatch` picks.

These functions trust their arguments (shapes, dtypes and sizes are validated by
`lightning_n2uq.compression`); all kernels give the same bytes.
"""

import importlib
from typing import Any

from torch import Tensor

from lightning_n2uq.ops.backends.reference import gradient_codec as codec_reference
from lightning_n2uq.ops.dispatch import kernel_for
from lightning_n2uq.ops.formats.gradient_codec import NUQFormat

_MODULES = {
    "numba": "lightning_n2uq.ops.backends.numba.gradient_codec",
    "triton": "lightning_n2uq.ops.backends.triton.gradient_codec",
}


def nuq_encode(x: Tensor, form: NUQFormat, seed: int, out: Tensor) -> None:
    """Encodes `x` into `out`.

    Args:
        x: Contiguous 1-D fp32 tensor.
        form: The wire format.
        seed: Seed of the message's random numbers.
        out: Contiguous uint8 tensor of `form.nbytes(x.numel())` bytes on the same device, overwritten.
    """
    kernel = kernel_for("nuq", x.device)
    if kernel == "reference":
        out.copy_(codec_reference.encode_reference(x, form, seed))
    elif x.numel():
        _load(kernel).encode(x, form, seed, out)


def nuq_decode_mean(payloads: Tensor, form: NUQFormat, numel: int, out: Tensor) -> None:
    """Decodes `W` messages and averages them into `out`: fp32 sum in row order, divided by `W`.

    Args:
        payloads: uint8 tensor `[W, form.nbytes(numel)]`, rows contiguous.
        form: The wire format.
        numel: Number of coordinates.
        out: Contiguous fp32 tensor `[numel]` on the same device, overwritten.
    """
    kernel = kernel_for("nuq", payloads.device)
    if kernel == "reference":
        out.copy_(codec_reference.decode_mean_reference(payloads, form, numel))
    elif numel:
        _load(kernel).decode_mean(payloads, form, numel, out)


def _load(kernel: str) -> Any:  # noqa: ANN401  # a kernel module: `encode` and `decode_mean` as above
    return importlib.import_module(_MODULES[kernel])
