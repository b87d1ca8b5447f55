"""Integer weights as codes of 1 to 8 bits, packed without gaps.

Code `q` of `b` bits stands for `2 q - (2^b - 1)` where levels are odd, else for `q - 2^(b - 1)`. Value `i`
takes bits `i b .. i b + b - 1` of the stream, lowest first; bit `j` of the stream is bit `j mod 8` of byte
`j div 8`. The last byte is filled with zeros.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def to_codes(integers: NDArray[Any], bits: int, odd: bool) -> NDArray[np.uint8]:
    """Returns the codes `0 .. 2^bits - 1` of integer weights."""
    codes: NDArray[np.uint8] = ((integers + _offset(bits, odd)) // (2 if odd else 1)).astype(np.uint8)
    return codes


def from_codes(codes: NDArray[Any], bits: int, odd: bool) -> NDArray[np.int16]:
    """Returns the int16 weights that the codes stand for."""
    integers: NDArray[np.int16] = codes.astype(np.int16) * (2 if odd else 1) - _offset(bits, odd)
    return integers


def _offset(bits: int, odd: bool) -> int:
    return 2**bits - 1 if odd else 2 ** (bits - 1)


def pack(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Packs codes below `2^bits`, in C order, into `ceil(size * bits / 8)` bytes.

    Raises:
        ValueError: `bits` is out of range or a code does not fit.
    """
    _check_bits(bits)
    if codes.size and int(codes.max()) >= 2**bits:
        raise ValueError(f"codes: got {int(codes.max())}, allowed is 0 to {2**bits - 1}")
    planes = (codes.reshape(-1, 1).astype(np.uint8) >> np.arange(bits, dtype=np.uint8)) & 1
    return np.packbits(planes.reshape(-1), bitorder="little")


def unpack(data: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.uint8]:
    """Returns the `count` codes that `pack` packed, uint8 `[count]`.

    Raises:
        ValueError: `bits` is out of range, or `data` has another length than such codes take.
    """
    _check_bits(bits)
    expected = -(-count * bits // 8)
    if count < 0 or data.dtype != np.uint8 or data.shape != (expected,):
        raise ValueError(f"data: got {data.dtype} {list(data.shape)}, allowed is uint8 [{expected}]")
    planes = np.unpackbits(data, count=count * bits, bitorder="little").reshape(count, bits)
    codes: NDArray[np.uint8] = (planes << np.arange(bits, dtype=np.uint8)).sum(1).astype(np.uint8)
    return codes


def _check_bits(bits: int) -> None:
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
        raise ValueError(f"bits: got {bits!r}, allowed is 1 to 8")
