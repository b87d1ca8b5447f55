"""Codes by a table lookup instead of one comparison per threshold.

A per-channel affine map cuts the axis into buckets with at most one threshold each:
`z = clip((x - low) scale)`, `j = floor(z)`. What is looked up in bucket `j` settles the code with a single
comparison. Every operation in front of the lookup is monotone, and buckets of thresholds are found with the
same float32 operations, so the code is exact for every input, whatever is rounded. The difference comes
first, as nothing can then be fused into a multiply-add that rounds once instead of twice. NaN gets bucket 0
and so code 0, as it passes no threshold. The tables are computed from the thresholds by nodes that read
constants only: runtimes do that once, when they load the file.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from lightning_n2uq.export.formats.onnx_graph import GraphWriter

BUCKETS = (32, 64, 128, 256, 512)
"""Sizes that are tried; each doubles the table."""
EXACT = 2**23
"""Integer thresholds stay below, so that float32 holds them and their neighbours."""

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Buckets:
    """`z = (x - low) * scale`, float32 `[C]`, and what `z` is at each threshold, `[C, n]`.

    Of integers, `edges` are the `z` of the first integer that passes (`scale` is a power of two and `z`
    exact), infinite for thresholds that all or no accumulators pass; of float32 numbers, the bucket numbers.
    """

    count: int
    low: Float32
    scale: Float32
    edges: Float32


def find_buckets(thresholds: NDArray[np.generic]) -> Buckets | None:
    """Returns the coarsest buckets with at most one threshold each, or None where there are none.

    Args:
        thresholds: Thresholds `[C, n]`, non-decreasing along `n`; int32 or float32.
    """
    find = _of_integers if thresholds.dtype == np.int32 else _of_floats
    return next((found for count in BUCKETS if (found := find(thresholds, count)) is not None), None)


def _of_integers(thresholds: NDArray[np.generic], count: int) -> Buckets | None:
    values = thresholds.astype(np.int64)
    # Equal ones at either end are mostly those that all or no accumulators pass; still, they are compared.
    if np.abs(values).max() >= EXACT or (np.diff(values, axis=1) == 0).any():
        return None
    low, span = values[:, 0], values[:, -1] - values[:, 0] + 1
    power = np.ceil(np.log2(np.maximum(span / (count - 2), 2.0**-20))).clip(0)
    scale = np.exp2(-power)
    edges = (values + 1 - low[:, None]) * scale[:, None]
    if not _alone(np.ceil(edges) - 1):
        return None
    single = (array.astype(np.float32) for array in (low, scale, edges))
    return Buckets(count, *single)


def _of_floats(thresholds: NDArray[np.generic], count: int) -> Buckets | None:
    values = thresholds.astype(np.float32)
    extreme = ~np.isfinite(values) | (np.abs(values) == np.finfo(np.float32).max)
    if extreme.any() or (np.diff(values, axis=1) <= 0).any():
        return None
    low, span = values[:, :1], np.ptp(values.astype(np.float64), axis=1, keepdims=True)
    with np.errstate(over="ignore"):
        scale = ((count - 1) / span).astype(np.float32)
        if not np.isfinite(scale).all():
            return None
        bucket = np.floor(np.clip((values - low) * scale, 0, count - 1))
    if not _alone(bucket):
        return None
    return Buckets(count, low[:, 0], scale[:, 0], bucket)


def _alone(bucket: NDArray[np.floating]) -> bool:
    return bool((np.diff(bucket, axis=1) > 0).all())


def write_lookup(
    name: str, x: str, thresholds: NDArray[np.generic], buckets: Buckets, writer: GraphWriter
) -> None:
    """Adds the nodes of one quantizer; its codes get `name`. `x` is `[N, H, W, C]`."""
    width = writer.shapes[name][2]
    integer = thresholds.dtype == np.int32
    real = writer.cast(x, TensorProto.FLOAT) if integer else x
    z = writer.op("Sub", [real, writer.wide(buckets.low, width)])
    z = writer.op("Mul", [z, writer.wide(buckets.scale, width)])
    # Integers: what is clipped keeps its fraction, and the last bucket holds no threshold.
    z = writer.op("Clip", [z, writer.const(np.float32(0)), writer.const(np.float32(buckets.count - 1))])
    index = writer.cast(z, TensorProto.INT32)
    if not integer:
        # NaN passes Clip, and becomes the smallest integer or 0.
        index = writer.op("Max", [index, writer.const(np.int32(0))])
    first = np.arange(len(thresholds), dtype=np.int32) * buckets.count
    index = writer.op("Add", [index, writer.wide(first, width)])
    index = writer.op("Reshape", [index, writer.ints(1, -1)])
    if integer:
        found = _look_up(_steps(buckets, writer), index, z, writer)
        writer.cast(writer.op("Add", [z, found]), TensorProto.UINT8, name)
        return
    limits, below = _comparisons(thresholds, buckets, writer)
    passed = writer.op("Greater", [x, _look_up(limits, index, z, writer)])
    one = writer.cast(passed, TensorProto.UINT8)
    writer.op("Add", [_look_up(below, index, z, writer), one], name)


def _look_up(table: str, index: str, like: str, writer: GraphWriter) -> str:
    flat = writer.op("GatherElements", [table, index], axis=1)
    return writer.op("Reshape", [flat, writer.op("Shape", [like])])


def _numbers(count: int, writer: GraphWriter) -> str:
    """`0 .. count - 1` as `[count, 1]`, against `[C, 1, n]`."""
    return writer.const(np.arange(count, dtype=np.float32)[:, None])


def _steps(buckets: Buckets, writer: GraphWriter) -> str:
    """`v` with `floor(z + v)` the code, `[1, C count]`: `sum_k clip(j + 1 - edge_k, 0, 1) - j`."""
    numbers = _numbers(buckets.count, writer)
    ends = writer.op("Sub", [numbers, writer.const(buckets.edges[:, None] - np.float32(1))])
    steps = writer.op("Clip", [ends, writer.const(np.float32(0)), writer.const(np.float32(1))])
    total = writer.op("ReduceSum", [steps, writer.ints(2)], keepdims=1)
    return writer.op("Reshape", [writer.op("Sub", [total, numbers]), writer.ints(1, -1)])


def _comparisons(thresholds: NDArray[np.generic], buckets: Buckets, writer: GraphWriter) -> tuple[str, str]:
    """By bucket, its threshold (infinity where it has none) and how many lie in earlier ones."""
    numbers = _numbers(buckets.count, writer)
    edges = writer.const(buckets.edges[:, None])
    none = writer.const(np.float32(np.inf))
    here = writer.op("Equal", [edges, numbers])
    limits = writer.op("Where", [here, writer.const(thresholds.astype(np.float32)[:, None]), none])
    limits = writer.op("ReduceMin", [limits, writer.ints(2)], keepdims=1)
    earlier = writer.cast(writer.op("Less", [edges, numbers]), TensorProto.FLOAT)
    below = writer.op("ReduceSum", [earlier, writer.ints(2)], keepdims=1)
    tables = limits, writer.cast(below, TensorProto.UINT8)
    limits, below = (writer.op("Reshape", [table, writer.ints(1, -1)]) for table in tables)
    return limits, below
