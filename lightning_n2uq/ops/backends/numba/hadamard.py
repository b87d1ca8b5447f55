# Compiled functions take no annotations: numba infers the types of their arguments.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
"""The randomized Walsh-Hadamard transform of one bucket in the first-level cache.

The bits of the index are transformed from the lowest to the highest, so that every sum and difference is the
reference's. The lowest six are done with 64 coordinates in registers, the others two or three at a time.
"""

import numba
import numpy as np

from lightning_n2uq.ops.backends.common.rng import GOLDEN
from lightning_n2uq.ops.backends.numba.gradient_codec import bucket_keys, mix
from lightning_n2uq.ops.backends.numba.vectors import butterflies

_GOLDEN = np.uint32(GOLDEN)

_eight = butterflies(1, True)
_sixty_four = butterflies(8, True)
_two, _four, _octet = butterflies(2, False), butterflies(4, False), butterflies(8, False)


@numba.njit
def transform(x):
    """Replaces `x` (fp32, a power of two from 8) by its Walsh-Hadamard transform, not normalised."""
    size = x.size
    if size >= 64:
        for start in range(0, size, 64):
            _sixty_four(x, start, 8)
        step = 64
    else:
        for start in range(0, size, 8):
            _eight(x, start, 8)
        step = 8
    while step < size:
        left = size // step
        if left == 2:
            _sweep(x, step, 2)
            step *= 2
        elif left == 4 or left == 16:
            _sweep(x, step, 4)
            step *= 4
        else:
            _sweep(x, step, 8)
            step *= 8


@numba.njit
def _sweep(x, step, count):
    """Transforms over `log2(count)` bits of the index from that of `step` on."""
    for block in range(0, x.size, count * step):
        for start in range(block, block + step, 8):
            if count == 2:
                _two(x, start, step)
            elif count == 4:
                _four(x, start, step)
            else:
                _octet(x, start, step)


@numba.njit
def sign_words(bucket, key, size, words):
    """Writes the random words whose bits are the signs of a bucket of `size`."""
    k0, k1 = bucket_keys(bucket, key[0], key[1])
    for index in range((size + 31) // 32):
        words[index] = np.int32(mix(np.uint32(k0 + np.uint32(np.uint32(index) * _GOLDEN)), k1))
