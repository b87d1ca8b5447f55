"""A deployed network: its steps, what is known about it, and how its folding went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from lightning_n2uq.export.ir.integer_steps import IntAdd, SumPool
from lightning_n2uq.export.ir.steps import (
    Codes,
    Concat,
    Flatten,
    Input,
    IntConv,
    MaxPool,
    Normalize,
    Step,
    UniformCodes,
)

OUTPUT = "logits"
"""The output's name in files that others run."""

_INTEGER = (Codes, UniformCodes, IntConv, IntAdd, SumPool)
"""Kinds of steps whose values are integers."""


@dataclass(frozen=True)
class FoldReport:
    """What happened to the operations in front of one quantizer.

    Attributes:
        name: Name of the quantizer's step.
        folded: How many per-channel operations went into the thresholds.
        explicit: How many stayed in front of it as float operations.
        integer: Whether thresholds are integers, compared with an accumulator.
        reversed_channels: Number of channels in which the folded map decreases.
        reason: Why operations stayed, or nothing.
    """

    name: str
    folded: int
    explicit: int
    integer: bool
    reversed_channels: int
    reason: str = ""

    def __str__(self) -> str:
        kind = "integer thresholds" if self.integer else "float thresholds"
        left = f", {self.explicit} left explicit ({self.reason})" if self.explicit else ""
        turned = f", {self.reversed_channels} channels reversed" if self.reversed_channels else ""
        return f"{self.name}: {kind}, {self.folded} operations folded{left}{turned}"


@dataclass(frozen=True)
class Description:
    """The network as steps in execution order; the first is its `Input`, the last gives the logits.

    Attributes:
        steps: All steps, in order; each reads only earlier ones.
        metadata: Texts by key, written into every file.
        folds: One entry per quantizer; empty for a network that was read from a file.
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
        assert isinstance(first, Input)
        return first

    @property
    def normalize(self) -> Normalize | None:
        """What is done to the images first, where the network takes uint8 pixels."""
        second = self.steps[1] if len(self.steps) > 1 else None
        return second if isinstance(second, Normalize) else None

    @property
    def output(self) -> str:
        """Name of the logits."""
        return self.steps[-1].name

    def quantizers(self) -> list[Codes | UniformCodes]:
        """Returns the steps that make codes."""
        return [step for step in self.steps if isinstance(step, Codes | UniformCodes)]

    def float_maps(self) -> list[str]:
        """Returns the names of the steps between the input and the logits whose values are no integers."""
        floating: set[str] = set()
        for step in self.steps[1:]:
            moved = isinstance(step, Flatten | MaxPool | Concat)
            if any(name in floating for name in step.inputs) if moved else not isinstance(step, _INTEGER):
                floating.add(step.name)
        return [step.name for step in self.steps[1:-1] if step.name in floating]

    def wide_layers(self) -> list[str]:
        """Returns the names of the integer layers whose sums can pass 2^24, which float32 would round."""
        return [step.name for step in self.steps if isinstance(step, IntConv) and step.needs_float64]

    def check_input(self, dtype: str, shape: Sequence[int]) -> None:
        """Raises `ValueError` unless images of this dtype and shape fit the input."""
        if tuple(shape[1:]) != self.input.shape or dtype != self.input.dtype:
            allowed = f"{self.input.dtype} [N, {', '.join(map(str, self.input.shape))}]"
            raise ValueError(f"images: got {dtype} {list(shape)}, allowed is {allowed}")

    def summary(self) -> str:
        """Returns quantizers with their folding, and layers whose sums do not fit float32, as text."""
        lines = [f"{len(self.steps)} steps, {len(self.folds)} activation quantizers"]
        lines += [f"  {fold}" for fold in self.folds]
        if not self.float_maps():
            lines.append("integer-only: every tensor between input and logits is an integer")
        lines.append(f"sums beyond 2^24 (float64 in PyTorch): {', '.join(self.wide_layers()) or 'none'}")
        return "\n".join(lines)


def with_output_named(description: Description) -> Description:
    """Returns the network with `logits` as the name of its output, as in the files that others run.

    Weights in files of tensors keep the layer's own name. So does a quantizer that comes last, by which its
    codes are compared, and a network that has another step of that name.
    """
    last, taken = description.steps[-1], {step.name for step in description.steps}
    if OUTPUT in taken or isinstance(last, Codes | UniformCodes | Input):
        return description
    return replace(description, steps=(*description.steps[:-1], replace(last, name=OUTPUT)))
