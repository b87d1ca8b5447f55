"""A deployed network: its steps, what is known about it, and how its folding went."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from lightning_n2uq.export.ir.steps import Codes, Input, IntConv, Step, UniformCodes

EXACT_FLOAT32 = 2**24
"""Integers up to here, and sums of them, are exact in float32."""


@dataclass(frozen=True)
class FoldReport:
    """What happened to the operations in front of one quantizer.

    Attributes:
        name: of the quantizer's step.
        folded: how many per-channel operations went into the thresholds.
        explicit: how many stayed in front of it as float operations.
        integer: whether thresholds are integers, compared with an accumulator.
        reversed_channels: channels in which the folded map decreases.
        reason: why operations stayed, or nothing.
    """

    name: str
    folded: int
    explicit: int
    integer: bool
    reversed_channels: int
    reason: str = ""


@dataclass(frozen=True)
class Description:
    """The network as steps in execution order; the first is its `Input`, the last gives the logits.

    Attributes:
        steps: in order; each reads only earlier ones.
        metadata: texts by key, written into every file.
        folds: one entry per quantizer.
    """

    steps: tuple[Step, ...]
    metadata: dict[str, str] = field(default_factory=dict)
    folds: tuple[FoldReport, ...] = ()

    def __post_init__(self) -> None:
        known: set[str] = set()
        for step in self.steps:
            missing = [name for name in step.inputs if name not in known]
            if missing or step.name in known:
                problem = f"reads unknown {missing}" if missing else "has a name in use"
                raise ValueError(f"steps: {step.op} {step.name!r} {problem}")
            known.add(step.name)
        if not self.steps or not isinstance(self.steps[0], Input):
            raise ValueError("steps: the first step is not an Input")

    @property
    def input(self) -> Input:
        """The first step."""
        first = self.steps[0]
        if not isinstance(first, Input):
            raise ValueError("steps: the first step is not an Input")
        return first

    @property
    def output(self) -> str:
        """Name of the logits."""
        return self.steps[-1].name

    def quantizers(self) -> list[Codes | UniformCodes]:
        """The steps that make codes."""
        return [step for step in self.steps if isinstance(step, Codes | UniformCodes)]

    def check_input(self, images: np.ndarray) -> None:
        """Raises `ValueError` unless `images` is `[N, *input.shape]` of the input's dtype."""
        shape, dtype = self.input.shape, self.input.dtype
        if images.shape[1:] != shape or images.dtype != np.dtype(dtype):
            wanted = ", ".join(map(str, shape))
            raise ValueError(
                f"images: got {images.dtype} {list(images.shape)}, allowed is {dtype} [N, {wanted}]"
            )

    def summary(self) -> str:
        """Quantizers with their folding, and layers whose sums do not fit float32, as text."""
        lines = [f"{len(self.steps)} steps, {len(self.folds)} activation quantizers"]
        for fold in self.folds:
            kind = "integer thresholds" if fold.integer else "float thresholds"
            flipped = f", {fold.reversed_channels} channels reversed" if fold.reversed_channels else ""
            left = f", {fold.explicit} left explicit ({fold.reason})" if fold.explicit else ""
            lines.append(f"  {fold.name}: {kind}, {fold.folded} operations folded{left}{flipped}")
        wide = [s.name for s in self.steps if isinstance(s, IntConv) and needs_float64(s)]
        lines.append(f"sums beyond 2^24 (float64 in PyTorch): {', '.join(wide) or 'none'}")
        return "\n".join(lines)


def needs_float64(step: IntConv) -> bool:
    """Whether some partial sum of the layer can pass 2^24, so that float32 would round it."""
    return bool(step.bound().max(initial=0) > EXACT_FLOAT32)
