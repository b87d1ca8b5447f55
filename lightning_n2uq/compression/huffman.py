"""Huffman coding with a static code per message and independent segments.

Layout: code lengths of the alphabet (4 bits each, 0 = symbol absent), one little-endian uint16 per segment
with its size in bytes, then the segments. A segment holds `SEGMENT` symbols (the last one the rest), least
significant bit first, each canonical codeword bit-reversed so that a table lookup on the low bits decodes it.
Segments are independent: threads share them, and one thread decodes four at a time, which hides the latency
of the lookups.

Huffman, Proceedings of the IRE 40(9), 1952.
"""

import heapq
import importlib.util

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
SEGMENT = 16384
LONGEST = 11  # bits of the longest codeword: a table of 2**11 entries stays in the first-level cache


class HuffmanCoder:
    """Codes symbols below `alphabet`, an even number, without loss.

    Raises:
        ValueError: If numba is not installed.
    """

    def __init__(self, alphabet: int) -> None:
        if importlib.util.find_spec("numba") is None:
            raise ValueError(
                "coding='huffman' needs numba, which is not installed: pip install numba, or use 'packed'."
            )
        self._alphabet = alphabet

    def compress(self, symbols: Bytes) -> Bytes:
        """Returns the coded symbols, code lengths included."""
        from lightning_n2uq.ops.backends.numba import huffman

        lengths = code_lengths(huffman.histogram(symbols, self._alphabet))
        sizes, streams = huffman.encode(symbols, codewords(lengths), lengths, SEGMENT, LONGEST)
        header = lengths[0::2] | lengths[1::2] << 4
        return np.concatenate([header, sizes.astype("<u2").view(np.uint8), streams])

    def expand(self, data: Bytes, count: int) -> Bytes:
        """Returns the `count` symbols.

        Raises:
            ValueError: If the header, a segment's size or its contents are malformed.
        """
        from lightning_n2uq.ops.backends.numba import huffman

        segments = -(-count // SEGMENT)
        start = self._alphabet // 2
        body = start + 2 * segments
        if len(data) < body:
            raise ValueError(f"payload is truncated: its header needs {body} bytes, got {len(data)}.")
        lengths = np.stack([data[:start] & 15, data[:start] >> 4], axis=1).reshape(-1)
        sizes = data[start:body].copy().view("<u2").astype(np.int64)
        if sizes.sum() != len(data) - body:
            raise ValueError(
                f"payload must have {sizes.sum()} bytes in its segments, got {len(data) - body}."
            )
        symbols = np.empty(count, dtype=np.uint8)
        if not huffman.decode(data[body:], sizes, decoding_table(lengths), SEGMENT, LONGEST, symbols):
            raise ValueError("payload is malformed: a segment does not decode to its symbols.")
        return symbols


def code_lengths(counts: npt.NDArray[np.int64]) -> Bytes:
    """Returns the lengths of an optimal code for the counts, at most `LONGEST` bits (0 for absent symbols).

    Where the optimal code is deeper, counts are flattened by halving until it is not, which costs little
    since only symbols rarer than about 1 in 2,000 are concerned.
    """
    counts = counts.astype(np.int64)
    lengths = _optimal_lengths(counts)
    while lengths.max(initial=0) > LONGEST:
        counts = np.where(counts > 0, counts // 2 + 1, 0)
        lengths = _optimal_lengths(counts)
    return lengths.astype(np.uint8)


def _optimal_lengths(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Returns the depths of the leaves of a Huffman tree; ties go to the node made first."""
    lengths = np.zeros(len(counts), dtype=np.int64)
    present = np.flatnonzero(counts).tolist()
    if len(present) == 1:  # a second codeword keeps the code complete, so that every bit pattern decodes
        lengths[[present[0], present[0] ^ 1]] = 1
        return lengths
    heap = [(count, node) for node, count in enumerate(counts[present].tolist())]
    heapq.heapify(heap)
    parents = [0] * (2 * len(present))
    for inner in range(len(present), 2 * len(present) - 1):
        first = heapq.heappop(heap)
        second = heapq.heapreplace(heap, (first[0] + heap[0][0], inner))
        parents[first[1]] = parents[second[1]] = inner
    depths = [0] * len(parents)
    for node in range(2 * len(present) - 3, -1, -1):
        depths[node] = depths[parents[node]] + 1
    lengths[present] = depths[: len(present)]
    return lengths


def codewords(lengths: Bytes) -> npt.NDArray[np.uint32]:
    """Returns the canonical codewords of the lengths, bit-reversed (first bit lowest)."""
    words = np.zeros(len(lengths), dtype=np.uint32)
    code, previous = 0, 0
    for length, symbol in sorted((int(length), symbol) for symbol, length in enumerate(lengths) if length):
        code <<= length - previous
        words[symbol] = int(format(code, f"0{length}b")[::-1], 2)
        code, previous = code + 1, length
    return words


def decoding_table(lengths: Bytes) -> npt.NDArray[np.uint16]:
    """Returns, for every `LONGEST` bits, the symbol they start with and its length: `symbol | length << 8`.

    Raises:
        ValueError: If the lengths are too long or belong to no complete prefix code.
    """
    present = lengths[lengths > 0].astype(np.int64)
    if present.max(initial=0) > LONGEST or (1 << (LONGEST - present)).sum() != 1 << LONGEST:
        raise ValueError("payload is malformed: its code lengths belong to no complete code.")
    table = np.zeros(1 << LONGEST, dtype=np.uint16)
    for symbol, word in enumerate(codewords(lengths)):
        length = int(lengths[symbol])
        if length:
            table[int(word) :: 1 << length] = symbol | length << 8
    return table
