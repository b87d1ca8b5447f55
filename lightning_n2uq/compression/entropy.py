"""Variable-length messages: a packed message whose codes are Huffman-coded.

Byte 0 is the mode. Mode 0: the packed message follows as it is (coding would not have made it shorter, as for
tiny messages). Mode 1: the norms follow, then the coded symbols. A symbol is as many codes as fit a byte: a
byte of the packed codes for 2, 4 and 8 bits, two codes for 3 bits. Coding several codes at once divides the
loss of Huffman's whole-bit lengths by their number. Each message carries its own code.

Coding runs on the CPU; messages of CUDA gradients are copied there and back.
"""

import numpy as np
import torch
from torch import Tensor

from lightning_n2uq.compression.huffman import Bytes, HuffmanCoder
from lightning_n2uq.ops.formats.gradient_codec import NUQFormat

_RAW, _CODED = 0, 1


class EntropyCoder:
    """Turns a packed message into a shorter one and back, without loss.

    Args:
        form: The format of the packed message.

    Raises:
        ValueError: If numba is not installed.
    """

    def __init__(self, form: NUQFormat) -> None:
        self._form = form
        self._alphabet = 64 if form.bits == 3 else 256
        self._symbols = HuffmanCoder(self._alphabet)

    def max_bytes(self, packed_bytes: int) -> int:
        """Returns the upper bound of a message's size: one byte more than the packed message."""
        return packed_bytes + 1

    def compress(self, packed: Tensor, numel: int, out: Tensor) -> Tensor:
        """Writes the coded message to the front of `out` and returns that part."""
        start = self._form.norm_bytes(numel)
        codes = packed[start:].cpu().numpy()
        body = self._symbols.compress(_to_six_bits(codes) if self._form.bits == 3 else codes)
        if len(body) >= len(codes):
            out[0] = _RAW
            out[1 : 1 + len(packed)].copy_(packed)
            return out[: 1 + len(packed)]
        out[0] = _CODED
        out[1 : 1 + start].copy_(packed[:start])
        out[1 + start : 1 + start + len(body)].copy_(torch.from_numpy(body))
        return out[: 1 + start + len(body)]

    def expand(self, message: Tensor, numel: int) -> Tensor:
        """Returns the packed message; raises ValueError if `message` is malformed."""
        if message.numel() == 0:
            raise ValueError("payload must have at least the mode byte, got 0 bytes.")
        mode = int(message[0])
        if mode == _RAW:
            return message[1:]
        if mode != _CODED:
            raise ValueError(f"payload is malformed: its mode must be {_RAW} or {_CODED}, got {mode}.")
        start, size = self._form.norm_bytes(numel), self._form.code_bytes(numel)
        if message.numel() < 1 + start:
            raise ValueError(
                f"payload must have over {start} bytes for {numel} coordinates, got {message.numel()}."
            )
        codes = self._expand_codes(message[1 + start :].cpu().numpy(), size)
        packed = torch.empty(start + size, dtype=torch.uint8, device=message.device)
        packed[:start].copy_(message[1 : 1 + start])
        packed[start:].copy_(torch.from_numpy(codes))
        return packed

    def _expand_codes(self, body: Bytes, size: int) -> Bytes:
        if self._form.bits != 3:
            return self._symbols.expand(body, size)
        return _from_six_bits(self._symbols.expand(body, -(-size // 3) * 4), size)


def _to_six_bits(codes: Bytes) -> Bytes:
    """Turns three bytes into four 6-bit symbols; the last bytes are padded with zeros."""
    a, b, c = np.pad(codes, (0, -len(codes) % 3)).reshape(-1, 3).T
    return np.stack([a & 63, (a >> 6 | b << 2) & 63, (b >> 4 | c << 4) & 63, c >> 2], axis=1).reshape(-1)


def _from_six_bits(symbols: Bytes, size: int) -> Bytes:
    p, q, r, s = symbols.reshape(-1, 4).T
    codes = np.stack([p | q << 6, q >> 2 | r << 4, r >> 4 | s << 2], axis=1).reshape(-1)
    if codes[size:].any():
        raise ValueError("payload is malformed: the bytes behind the last code are not zero.")
    return codes[:size]
