"""Asymmetric numeral systems with a static model per message, by the library `constriction`.

Layout, all little-endian: CRC-32 of the symbols (the stack coder alone cannot tell a truncated message); the
frequencies of the alphabet as uint16 (the largest is 65535, 0 = symbol absent); the coder's 32-bit words.
Closer to the entropy than Huffman coding, and slower to decode.

Duda, arXiv 1311.2540; Bamler, arXiv 2201.01741 (constriction).
"""

import importlib.util
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


class AnsCoder:
    """Codes symbols below `alphabet`.

    Raises:
        ValueError: If constriction is not installed.
    """

    def __init__(self, alphabet: int) -> None:
        if importlib.util.find_spec("constriction") is None:
            raise ValueError(
                "coding='ans' needs constriction, which is not installed: "
                "pip install 'lightning_n2uq[entropy]', or use 'packed' or 'huffman'."
            )
        self._alphabet = alphabet

    def compress(self, symbols: Bytes) -> Bytes:
        """The coded symbols, frequencies included."""
        import constriction

        frequencies = _frequencies(np.bincount(symbols, minlength=self._alphabet))
        coder = constriction.stream.stack.AnsCoder()
        if len(symbols):
            coder.encode_reverse(symbols.astype(np.int32), _model(frequencies))
        words = coder.get_compressed().astype("<u4")
        checksum = np.array([zlib.crc32(symbols.tobytes())], dtype="<u4")
        return np.concatenate([part.view(np.uint8) for part in (checksum, frequencies, words)])

    def expand(self, data: Bytes, count: int) -> Bytes:
        """The `count` symbols.

        Raises:
            ValueError: If the frequencies or the words are malformed.
        """
        start = 4 + 2 * self._alphabet
        if len(data) < start or (len(data) - start) % 4:
            raise ValueError(f"payload must have {start} bytes and then whole words, got {len(data)} bytes.")
        frequencies = data[4:start].copy().view("<u2")
        if not frequencies.any():
            raise ValueError("payload is malformed: no symbol has a frequency.")
        symbols = _decode(data[start:].copy().view("<u4"), _model(frequencies), count)
        if zlib.crc32(symbols.tobytes()) != int.from_bytes(data[:4].tobytes(), "little"):
            raise ValueError("payload is malformed: its checksum does not match.")
        return symbols


def _frequencies(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.uint16]:
    """Counts scaled to 16 bits; symbols that occur keep at least 1."""
    scaled = -(-counts * 65535 // max(int(counts.max()), 1))
    return scaled.astype("<u2")


def _model(frequencies: npt.NDArray[np.uint16]) -> Any:  # noqa: ANN401  # constriction has no type stubs
    import constriction

    weights = frequencies.astype(np.float32)
    return constriction.stream.model.Categorical(weights / weights.sum(dtype=np.float32), perfect=False)


def _decode(words: npt.NDArray[np.uint32], model: Any, count: int) -> Bytes:  # noqa: ANN401
    import constriction

    if count == 0:
        return np.empty(0, dtype=np.uint8)
    try:
        coder = constriction.stream.stack.AnsCoder(words)
    except ValueError as error:  # no encoder ends with a zero word
        raise ValueError(f"payload is malformed: {error}") from error
    symbols: Bytes = coder.decode(model, count).astype(np.uint8)
    return symbols
