"""Every quantizer on its own, at the values where engines could disagree."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_n2uq.export.ir.description import Description
from lightning_n2uq.export.ir.steps import EXACT_FLOAT32, Codes, Input, UniformCodes
from lightning_n2uq.export.ir.thresholds import uniform_thresholds
from lightning_n2uq.export.runtime.engines import ENGINES

SWEPT = tuple(name for name in ENGINES if name != "pt2")
"""Engines that run one quantizer alone; pt2 would compile a package for each."""


def sweep_values(step: Codes | UniformCodes, count: int, seed: int = 0) -> NDArray[Any]:
    """Returns inputs `[1, C, m, 1]` of the quantizer, at least `count` in all.

    They hold, for every channel, each threshold and its neighbours on both sides, zero, the largest finite
    numbers and (for float32) both infinities and NaN; the rest is random, half of it around the thresholds.
    """
    rng = np.random.default_rng(seed)
    table = step.thresholds if isinstance(step, Codes) else uniform_thresholds(step)
    sign = step.sign if isinstance(step, Codes) else None
    channels = len(table) if sign is None else max(len(table), sign.size)
    table = np.broadcast_to(table, (channels, table.shape[1]))
    rest = max(-(-count // channels) - 3 * table.shape[1] - 6, 2)
    near = rng.integers(0, table.shape[1], (channels, rest // 2))
    around = np.take_along_axis(table, near, 1)
    kind = _integers if np.issubdtype(table.dtype, np.integer) else _floats
    values = kind(table, around, rest - rest // 2, rng)
    if sign is not None:
        values = values * sign[:, None].astype(values.dtype)
    return values[None, :, :, None]


def _integers(
    table: NDArray[Any], around: NDArray[Any], count: int, rng: np.random.Generator
) -> NDArray[Any]:
    limit, channels = EXACT_FLOAT32 - 1, len(table)
    table, around = table.astype(np.int64), around.astype(np.int64)
    parts = [
        *(table, table - 1, table + 1),
        np.broadcast_to([0, -limit, limit, 1, -1, 2], (channels, 6)),
        around + rng.integers(-8, 9, around.shape),
        rng.integers(-limit, limit, (channels, count)),
    ]
    values: NDArray[Any] = np.clip(np.concatenate(parts, 1), -limit, limit).astype(np.int32)
    return values


def _floats(table: NDArray[Any], around: NDArray[Any], count: int, rng: np.random.Generator) -> NDArray[Any]:
    largest, channels = np.finfo(np.float32).max, len(table)
    spread = float(np.abs(np.clip(table, -1e6, 1e6)).max(initial=0.0)) + 1.0
    finite = np.clip(around.astype(np.float64), -largest, largest)
    with np.errstate(over="ignore"):
        parts = [
            table,
            *(np.nextafter(table, np.float32(end)) for end in (-np.inf, np.inf)),
            np.broadcast_to([0, -np.inf, np.inf, np.nan, -largest, largest], (channels, 6)),
            finite * (1 + rng.normal(0, 1e-6, around.shape)),
            rng.normal(0, 2 * spread, (channels, count)),
        ]
        return np.concatenate(parts, 1).astype(np.float32)


def sweep(step: Codes | UniformCodes, count: int, engines: Iterable[str] = SWEPT) -> dict[str, int]:
    """Runs one quantizer on `sweep_values` in each engine.

    Returns:
        The mismatches with the first engine by name, and under `"values"` the number of values.
    """
    values, alone = sweep_values(step, count), replace(step, inputs=("x",))
    reference: NDArray[Any] | None = None
    mismatches = {"values": values.size}
    for name in engines:
        x = values.astype(np.float32) if name == "qonnx" else values  # whose integers are float32
        network = Description((Input("x", (), x.shape[1:], str(x.dtype)), alone))
        codes = ENGINES[name](network)(x).codes[step.name]
        reference = codes if reference is None else reference
        mismatches[name] = int((codes != reference).sum())
    return mismatches
