"""Signs of reversed channels folded into the weights in front of them, where they cost nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lightning_n2uq.export.ir.steps import Affine, Codes, IntConv, Step


def fold_signs(steps: Sequence[Step]) -> tuple[Step, ...]:
    """Negates output channels of integer layers so that the quantizers behind need no sign.

    Only where the negative weights are levels too and every reader of the accumulator can take it.
    """
    folded = {step.name: step for step in steps}
    for step in steps:
        if isinstance(step, IntConv) and (step.odd or step.weight.min(initial=0) > -(2 ** (step.bits - 1))):
            _fold(step, [reader for reader in folded.values() if step.name in reader.inputs], folded)
    return tuple(folded.values())


def _fold(layer: IntConv, readers: list[Step], folded: dict[str, Step]) -> None:
    sign = next((r.sign for r in readers if isinstance(r, Codes) and r.sign is not None), None)
    if sign is None or not all(isinstance(reader, Codes | Affine) for reader in readers):
        return
    shape = (-1,) + (1,) * (layer.weight.ndim - 1)
    folded[layer.name] = replace(
        layer, weight=(layer.weight * sign.reshape(shape)).astype(layer.weight.dtype)
    )
    for reader in readers:
        if isinstance(reader, Codes):
            rest = sign if reader.sign is None else reader.sign * sign
            folded[reader.name] = replace(reader, sign=None if (rest == 1).all() else rest.astype(np.int32))
        elif isinstance(reader, Affine):
            scale = np.ones(len(sign), np.float32) if reader.scale is None else reader.scale
            folded[reader.name] = replace(reader, scale=(scale * sign).astype(np.float32))
