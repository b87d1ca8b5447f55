"""NUQSGD's gradient codec, QSGD's by other arguments, and both with rotated buckets."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_n2uq.compression.base import (
    Codec,
    check_gradient,
    check_payload,
    check_size,
    gradient_buffer,
    message_buffer,
)
from lightning_n2uq.compression.entropy import EntropyCoder
from lightning_n2uq.compression.levels import Rotation, make_format, make_rotated_format
from lightning_n2uq.compression.rotation_theory import rotated_variance_bound
from lightning_n2uq.compression.theory import variance_bound
from lightning_n2uq.ops.formats.gradient_codec import Norm, NUQFormat
from lightning_n2uq.ops.formats.rotated_codec import KEY_BYTES, RotatedFormat, Rounding
from lightning_n2uq.ops.gradient_codec import (
    nuq_decode_mean,
    nuq_encode,
    rotated_decode_mean,
    rotated_encode,
)
from lightning_n2uq.utils.validation import check

Coding = Literal["packed", "huffman"]


class NUQCodec(Codec):
    """Unbiased stochastic quantization to nonuniform levels, bucket by bucket, in packed bytes.

    Implements the quantizer `Q_s` of NUQSGD (Ramezani-Kebrya et al., JMLR 22(114), 2021, arXiv 1908.06077,
    section 3.1). `levels="uniform"` is QSGD (Alistarh et al., 2017), with `norm="linf"` QSGDinf. The wire
    format is documented in `lightning_n2uq.ops.formats.gradient_codec`, the arithmetic in
    `lightning_n2uq.ops.backends.reference.gradient_codec`; Huffman-coded messages in
    `lightning_n2uq.compression.entropy`.

    A bucket with a NaN or an infinity, or whose norm exceeds fp32 (3.4e38), decodes to NaN everywhere; a zero
    bucket to zeros. A level times a subnormal norm is rounded to a multiple of 2^-149, float32's smallest
    step: there the mean of what decodes may be off by 2^-150 per coordinate, and by nothing above.

    With `rotation="hadamard"` every bucket is rotated at random (signs, then a Walsh-Hadamard transform),
    after which its coordinates are nearly normally distributed whatever they were, and rounded to the levels
    that are best for the normal distribution, `levels="gaussian"`. `rounding="stochastic"` is unbiased for
    every input and every rotation. `rounding="eden"` takes the nearest level and EDEN's scale (Vargaftik et
    al., ICML 2022, arXiv 2108.08842): a smaller error, which is orthogonal to the gradient and unbiased over
    uniformly random rotations. Format and arithmetic are in `lightning_n2uq.ops.formats.rotated_codec` and
    `lightning_n2uq.ops.backends.reference.rotated_codec`.

    Args:
        bits: The bits per coordinate, sign included: 2, 3, 4 or 8; with rotation 1 to 4.
        bucket_size: The number of coordinates that share a norm; a multiple of 8 (with rotation a power of
            two), at most 32768.
        norm: The norm of a bucket, `l2` (the paper's) or `linf`; not used with rotation.
        levels: The levels: `exponential` (the paper's), `uniform`, `float`, or `2**(bits - 1)` ascending
            numbers from 0 to 1; `gaussian` with rotation. None takes `exponential`, or `gaussian` with
            rotation.
        mantissa_bits: The mantissa bits of `float` levels; None takes those with the smallest variance bound.
        coding: How codes are written: `packed` (fixed size) or `huffman` (smaller, of variable size, coded
            on the CPU).
        rotation: `none` or `hadamard`.
        rounding: `stochastic`, or with rotation `eden` (nearest level).

    Raises:
        ValueError: If an argument is not allowed, or `huffman` is wanted and numba is missing.

    Example:
        >>> import torch
        >>> codec = NUQCodec(bits=4)
        >>> gradient = torch.linspace(-1, 1, 5000)
        >>> message = codec.encode(gradient, seed=1)
        >>> message.numel() == codec.nbytes(5000) == 4 * 5 + 2500
        True
        >>> codec.decode(message, 5000).shape
        torch.Size([5000])
    """

    def __init__(
        self,
        bits: int = 4,
        bucket_size: int = 1024,
        norm: Norm = "l2",
        levels: str | Sequence[float] | None = None,
        mantissa_bits: int | None = None,
        coding: Coding = "packed",
        rotation: Rotation = "none",
        rounding: Rounding = "stochastic",
    ) -> None:
        _check_coding(coding, rotation)
        self.coding: Coding = coding
        self.form: NUQFormat | RotatedFormat
        self._coder = None
        if rotation == "none":
            form = make_format(bits, bucket_size, norm, levels or "exponential", mantissa_bits, rounding)
            self.form = form
            self._coder = EntropyCoder(form) if coding == "huffman" else None
        else:
            self.form = make_rotated_format(
                bits, bucket_size, norm, levels, mantissa_bits, rotation, rounding
            )
        self.fixed_size = self._coder is None

    @property
    def bits(self) -> int:
        """Returns the bits per coordinate, before entropy coding."""
        return self.form.bits

    @property
    def bucket_size(self) -> int:
        """Returns the number of coordinates per bucket."""
        return self.form.bucket_size

    def nbytes(self, numel: int) -> int:
        """Returns the bytes of a message: exact for `packed`, an upper bound for `huffman`."""
        packed = self.form.nbytes(numel)
        return packed if self._coder is None else self._coder.max_bytes(packed)

    def encode(self, x: Tensor, seed: int, out: Tensor | None = None) -> Tensor:
        """Quantizes and packs; see `Codec.encode`."""
        x = check_gradient(x)
        numel = x.numel()
        message = message_buffer(out, self.nbytes(numel), x.device)
        if isinstance(self.form, RotatedFormat):
            rotated_encode(x, self.form, seed, message)
            return message
        if self._coder is None:
            nuq_encode(x, self.form, seed, message)
            return message
        packed = torch.empty(self.form.nbytes(numel), dtype=torch.uint8, device=x.device)
        nuq_encode(x, self.form, seed, packed)
        return self._coder.compress(packed, numel, message)

    def decode(self, payload: Tensor, numel: int, out: Tensor | None = None) -> Tensor:
        """Unpacks and scales; see `Codec.decode`."""
        return self.decode_mean([payload], numel, out)

    def decode_mean(
        self, payloads: Sequence[Tensor] | Tensor, numel: int, out: Tensor | None = None
    ) -> Tensor:
        """Decodes, sums in the given order and divides, in one pass over `out`; see `Codec.decode_mean`."""
        rows = self._rows(payloads, numel)
        result = gradient_buffer(out, numel, rows.device)
        if isinstance(self.form, RotatedFormat):
            rotated_decode_mean(rows, self.form, numel, result)
        else:
            nuq_decode_mean(rows, self.form, numel, result)
        return result

    def _rows(self, payloads: Sequence[Tensor] | Tensor, numel: int) -> Tensor:
        """Returns the validated packed messages as one uint8 tensor `[W, nbytes]`."""
        if len(payloads) == 0:
            raise ValueError("payloads must hold at least one message, got none.")
        messages = [check_payload(payload, numel) for payload in payloads]
        if self._coder is not None:
            messages = [self._coder.expand(message, numel) for message in messages]
        for message in messages:
            self._check_packed(message, numel)
        if isinstance(payloads, Tensor) and self._coder is None and payloads.stride(1) == 1:
            return payloads
        return messages[0].unsqueeze(0) if len(messages) == 1 else torch.stack(messages)

    def _check_packed(self, message: Tensor, numel: int) -> None:
        check_size(message, self.form.nbytes(numel), numel)
        if message.device.type == "cpu":  # elsewhere the check would wait for the device
            _check_contents(message, self.form, numel)

    def variance_bound(self) -> float:
        """Returns the bound `e` of `E||decode(encode(v)) - v||^2 <= e ||v||^2`.

        Derived in `compression.theory` and, for rotated buckets, in `compression.rotation_theory`.
        """
        if isinstance(self.form, RotatedFormat):
            return rotated_variance_bound(self.form)
        return variance_bound(self.form)

    def describe(self) -> str:
        """Returns every parameter that the bytes depend on, in one line."""
        form = self.form
        if isinstance(form, RotatedFormat):
            return (
                f"nuq(bits={form.bits}, bucket_size={form.bucket_size}, rotation=hadamard, "
                f"rounding={form.rounding}, levels={form.levels})"
            )
        levels = {"float": f"float{form.mantissa_bits}", "uniform": "uniform"}.get(
            form.family, str(form.table)
        )
        return (
            f"nuq(bits={form.bits}, bucket_size={form.bucket_size}, norm={form.norm}, levels={levels}, "
            f"coding={self.coding})"
        )


def _check_coding(coding: str, rotation: str) -> None:
    if coding not in get_args(Coding):
        why = "; 'ans' was removed because 'huffman' is faster in every measurement" * (coding == "ans")
        raise ValueError(f"coding must be one of {', '.join(get_args(Coding))}, got {coding!r}{why}.")
    # Codes of rotated buckets are near the entropy's limit: at 4 bits nothing would be saved but 5 %.
    check(
        coding == "packed" or rotation == "none", "coding", coding, f"is 'packed' with rotation={rotation!r}"
    )


def _check_contents(message: Tensor, form: NUQFormat | RotatedFormat, numel: int) -> None:
    """Raises ValueError for bytes no encoder writes: negative norms, set bits behind the last code."""
    if isinstance(form, RotatedFormat):
        scales = message[KEY_BYTES : form.groups_start(numel)]
        if numel and int(scales[3::4].max()) >= 128:
            raise ValueError("payload is malformed: a bucket's scale is negative.")
        return
    if numel and int(message[3 : form.norm_bytes(numel) : 4].max()) >= 128:
        raise ValueError("payload is malformed: a bucket's norm is negative.")
    unused = -numel * form.bits % 8
    if unused and int(message[-1]) >> (8 - unused):
        raise ValueError(f"payload is malformed: the {unused} bits behind the last code are not zero.")
