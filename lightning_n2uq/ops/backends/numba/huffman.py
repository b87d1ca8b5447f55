# Compiled functions take no annotations: numba infers the types of their arguments.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
"""Numba kernels of Huffman coding; the layout is documented in `lightning_n2uq.compression.huffman`."""

import numba
import numpy as np
import numpy.typing as npt

from lightning_n2uq.ops.backends.common.kernel_cache import cached
from lightning_n2uq.ops.backends.common.threads import run_ranges

Bytes = npt.NDArray[np.uint8]
_SMALLEST_RANGE = 8  # segments per thread


@cached
@numba.njit(nogil=True)
def _count(symbols, counts):
    """Counts in four tables in turn: equal neighbours would otherwise wait for each other's store."""
    whole = symbols.size & ~3
    for j in range(0, whole, 4):
        for k in range(4):
            counts[k, symbols[j + k]] += 1
    for j in range(whole, symbols.size):
        counts[0, symbols[j]] += 1


@cached
@numba.njit(nogil=True)
def _encode_range(symbols, first, last, entries, segment, stride, sizes, scratch):
    """Encodes segments `first .. last`, each into its own `stride` bytes of `scratch`.

    `entries` holds `codeword | length << 16`. Four symbols take at most 44 bits, which together with at most
    7 pending bits are stored as one 64-bit word; only whole bytes advance the position.
    """
    for index in range(first, last):
        start = index * segment
        stop = min(start + segment, symbols.size)
        base = index * stride
        position = base
        pending = np.uint64(0)
        filled = np.uint64(0)
        whole = start + ((stop - start) & ~3)
        for j in range(start, whole, 4):
            for k in range(4):
                entry = entries[symbols[j + k]]
                pending |= (entry & np.uint64(0xFFFF)) << filled
                filled += entry >> np.uint64(16)
            for k in range(8):
                scratch[position + k] = np.uint8(pending >> np.uint64(8 * k))
            position += np.int64(filled >> np.uint64(3))
            pending >>= filled & np.uint64(56)
            filled &= np.uint64(7)
        for j in range(whole, stop):
            entry = entries[symbols[j]]
            pending |= (entry & np.uint64(0xFFFF)) << filled
            filled += entry >> np.uint64(16)
        while np.int64(filled) > 0:
            scratch[position] = np.uint8(pending)
            position += 1
            pending >>= np.uint64(8)
            filled = filled - np.uint64(8) if filled > np.uint64(8) else np.uint64(0)
        sizes[index] = position - base


@numba.njit
def _load64(data, byte):
    word = np.uint64(0)
    for k in range(8):
        word |= np.uint64(data[byte + k]) << np.uint64(8 * k)
    return word


@numba.njit
def _step(data, limit, bit, table, mask, out, position):
    """Decodes four symbols (at most 44 of the 57 bits at hand) and returns the next bit position."""
    word = _load64(data, min(bit >> 3, limit)) >> np.uint64(bit & 7)
    used = np.uint64(0)
    for k in range(4):
        entry = np.uint64(table[np.int64((word >> used) & mask)])
        out[position + k] = np.uint8(entry)
        used += entry >> np.uint64(8)
    return bit + np.int64(used)


@numba.njit
def _finish(data, limit, bit, end, table, mask, out, position, stop):
    """Decodes the last symbols of a segment one by one; True if exactly its bytes were used."""
    for j in range(position, stop):
        word = _load64(data, min(bit >> 3, limit)) >> np.uint64(bit & 7)
        entry = np.int64(table[np.int64(word & mask)])
        out[j] = np.uint8(entry & 255)
        bit += entry >> 8
    return (bit + 7) >> 3 == end


@cached
@numba.njit(nogil=True)
def _decode_range(data, ends, first, last, table, mask, segment, out, valid):
    """Decodes segments `first .. last`, four at a time where four whole ones are left.

    `data` is padded with 8 bytes, and reads are clamped to it, so malformed streams cannot lead outside.
    """
    limit = data.size - 8
    index = first
    whole = segment & ~3
    while index < last:
        lanes = 4 if index + 4 <= last and (index + 4) * segment <= out.size else 1
        a = ends[index] * 8
        o = index * segment
        if lanes == 4:
            b, c, d = ends[index + 1] * 8, ends[index + 2] * 8, ends[index + 3] * 8
            for j in range(o, o + whole, 4):
                a = _step(data, limit, a, table, mask, out, j)
                b = _step(data, limit, b, table, mask, out, j + segment)
                c = _step(data, limit, c, table, mask, out, j + 2 * segment)
                d = _step(data, limit, d, table, mask, out, j + 3 * segment)
            bits = (a, b, c, d)
            for k in range(4):
                start, end = o + k * segment, ends[index + k + 1]
                ok = _finish(data, limit, bits[k], end, table, mask, out, start + whole, start + segment)
                valid[index + k] = ok
        else:
            valid[index] = _finish(
                data, limit, a, ends[index + 1], table, mask, out, o, min(o + segment, out.size)
            )
        index += lanes


def histogram(symbols: Bytes, alphabet: int) -> npt.NDArray[np.int64]:
    """Returns how often each symbol occurs, int64 `[alphabet]`."""
    counts = np.zeros((4, 256), dtype=np.int64)
    _count(symbols, counts)
    total: npt.NDArray[np.int64] = counts.sum(axis=0)
    return total[:alphabet]


def encode(
    symbols: Bytes, words: npt.NDArray[np.uint32], lengths: Bytes, segment: int, longest: int
) -> tuple[npt.NDArray[np.int64], Bytes]:
    """Encodes all segments.

    Args:
        symbols: uint8 `[n]`.
        words: Codewords, first bit lowest.
        lengths: Their lengths.
        segment: Symbols per segment.
        longest: Longest codeword in bits.

    Returns:
        The segments' sizes in bytes, and the segments joined.
    """
    count = -(-len(symbols) // segment)
    stride = segment * longest // 8 + 16
    entries = words.astype(np.uint64) | lengths.astype(np.uint64) << np.uint64(16)
    sizes = np.zeros(count, dtype=np.int64)
    scratch = np.empty(count * stride, dtype=np.uint8)

    def kernel(first: int, last: int) -> None:
        _encode_range(symbols, first, last, entries, segment, stride, sizes, scratch)

    run_ranges(kernel, count, _SMALLEST_RANGE)
    parts = [scratch[index * stride : index * stride + size] for index, size in enumerate(sizes.tolist())]
    return sizes, np.concatenate(parts) if parts else scratch


def decode(
    data: Bytes,
    sizes: npt.NDArray[np.int64],
    table: npt.NDArray[np.uint16],
    segment: int,
    longest: int,
    out: Bytes,
) -> bool:
    """Decodes all segments into `out`.

    Args:
        data: The segments joined.
        sizes: Their sizes in bytes; they add up to `len(data)`.
        table: From `huffman.decoding_table`.
        segment: Symbols per segment.
        longest: Longest codeword in bits.
        out: uint8 `[n]`, overwritten.

    Returns:
        Whether every segment decoded to its symbols with its bytes used up.
    """
    ends = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    padded = np.concatenate([data, np.zeros(8, dtype=np.uint8)])
    valid = np.zeros(len(sizes), dtype=np.bool_)
    mask = np.uint64((1 << longest) - 1)

    def kernel(first: int, last: int) -> None:
        _decode_range(padded, ends, first, last, table, mask, segment, out, valid)

    run_ranges(kernel, len(sizes), _SMALLEST_RANGE)
    return bool(valid.all())
