"""Why two ways of computing one quantized network differ: by codes at thresholds, or by a bug.

Floating-point sums depend on their order, and one rounding beside a threshold moves a code, which moves what
follows. So the second network is run once more with the first one's codes put in: then every value in front
of a quantizer must agree within roundings, and every code must be the one that the second network's own value
gets. What is left of the difference comes from codes at thresholds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from lightning_n2uq.export.program.detectors import traceable_detectors
from lightning_n2uq.export.program.layers import DeployedQuantizer
from lightning_n2uq.export.program.onnx_program import CHOICES, CODES, INPUTS, ExportedProgram, Inputs
from lightning_n2uq.export.program.traces import Trace, tracing

TOLERANCE = 1e-4
"""Allowed difference of values in front of a quantizer, and of outputs, relative to the largest magnitude."""


@dataclass(frozen=True)
class Difference:
    """One call of a quantizer.

    Attributes:
        name: The layer, `#2` behind it for its second call.
        values: How many codes there are.
        moved: How many of them differ where both networks run freely.
        inputs: Largest difference of what the quantizer is given, relative to the largest magnitude, where
            everything before it had the same codes.
        wrong: How many codes are not those of their own input.
    """

    name: str
    values: int
    moved: int
    inputs: float
    wrong: int

    @property
    def explained(self) -> bool:
        """Whether codes at thresholds are all that differs."""
        return not self.wrong and self.inputs <= TOLERANCE


@dataclass
class Explanation:
    """Two ways of computing one network, layer by layer.

    Attributes:
        layers: One entry per call of a quantizer, in order.
        free: Largest difference of outputs relative to the largest magnitude, where both run freely.
        forced: The same where the codes of one were put into the other.
    """

    layers: list[Difference] = field(default_factory=list)
    free: float = 0.0
    forced: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether the two differ by codes at thresholds and by roundings alone."""
        return self.forced <= TOLERANCE and all(layer.explained for layer in self.layers)

    def table(self) -> str:
        """Returns the comparison as text, one quantizer per line."""
        width = max([9, *(len(layer.name) for layer in self.layers)])
        lines = [
            f"{'quantizer':<{width}}  codes that differ  inputs, same codes before  codes not of their input"
        ]
        for row in self.layers:
            share = f"{row.moved}/{row.values}"
            lines.append(f"{row.name:<{width}}  {share:>17}  {row.inputs:>25.1e}  {row.wrong:>24}")
        lines.append(
            f"outputs differ by {self.free:.1e} of the largest; with the same codes by {self.forced:.1e}"
        )
        verdict = (
            "codes at thresholds and roundings alone" if self.ok else "NOT EXPLAINED by codes at thresholds"
        )
        return "\n".join([*lines, f"difference: {verdict}"])


@torch.no_grad()
def explain_file(program: ExportedProgram, inputs: Inputs | None = None) -> Explanation:
    """Compares the file, run by onnxruntime, with the network that it was traced from.

    Args:
        program: What was exported.
        inputs: What to call both with; None for the inputs of the export.
    """
    import onnxruntime

    inputs = inputs or program.inputs
    session = onnxruntime.InferenceSession(program.watched.SerializeToString())
    given = zip(session.get_inputs(), inputs.tensors(), strict=True)
    found = session.run(None, {place.name: value.numpy() for place, value in given})
    named = zip([output.name for output in session.get_outputs()], map(torch.from_numpy, found), strict=True)
    results = dict(named)
    values, codes, choices = (
        {k.removeprefix(prefix): v for k, v in results.items() if k.startswith(prefix)}
        for prefix in (INPUTS, CODES, CHOICES)
    )
    outputs = [v for k, v in results.items() if not k.startswith((INPUTS, CODES, CHOICES))]
    return _compare(program, inputs, outputs, Trace(values, codes, choices))


@torch.no_grad()
def explain_modules(program: ExportedProgram, model: nn.Module, inputs: Inputs | None = None) -> Explanation:
    """Compares the plain float modules of the trained network with the network that was deployed from it.

    Args:
        program: What was exported.
        model: The trained network.
        inputs: What to call both with; None for the inputs of the export.
    """
    inputs, training, handles = inputs or program.inputs, model.training, []
    with tracing() as seen, traceable_detectors(model):
        for name, layer in model.named_modules():
            quantizer = getattr(layer, "activation_quantizer", None)
            if quantizer is not None and getattr(quantizer, "name", "") != "float":
                handles.append(quantizer.register_forward_pre_hook(_noting(seen.note, name)))
        try:
            outputs = inputs.call(model.eval())
        finally:
            model.train(training)
            for handle in handles:
                handle.remove()
    return _compare(program, inputs, outputs, seen)


def _noting(note: Callable[[str, Tensor, Tensor], Tensor], name: str) -> Callable[..., None]:
    def hook(quantizer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        x = arguments[0].detach().float().contiguous()
        note(name, x, quantizer.codes(x))  # type: ignore[operator]

    return hook


def _compare(program: ExportedProgram, inputs: Inputs, outputs: list[Tensor], theirs: Trace) -> Explanation:
    """Compares a network, known by its outputs and by what its trace saw, with the deployed one."""
    network = program.deployed.model
    with traceable_detectors(network):
        with tracing() as free:
            freely = inputs.call(network)
        with tracing(forced={**theirs.codes, **theirs.choices}) as forced:
            with_codes = inputs.call(network)
    report = Explanation()
    report.free = max(map(_relative, outputs, freely), default=0.0)
    report.forced = max(map(_relative, outputs, with_codes), default=0.0)
    stairs = {m.name: m for m in network.modules() if isinstance(m, DeployedQuantizer)}
    for name, codes in theirs.codes.items():
        own = torch.searchsorted(stairs[name.partition("#")[0]].thresholds, theirs.inputs[name].contiguous())
        moved, off = _moved(codes, free.codes[name]), _relative(theirs.inputs[name], forced.inputs[name])
        report.layers.append(Difference(name, codes.numel(), moved, off, int((own != codes).sum())))
    for name, choice in theirs.choices.items():
        moved, off = _moved(choice, free.choices[name]), forced.margins[name]
        report.layers.append(Difference(name, choice.numel(), moved, off, 0))
    return report


def _moved(theirs: Tensor, own: Tensor) -> int:
    """Returns how many codes or choices differ: all where there are more of them on one side."""
    return int((theirs != own).sum()) if theirs.shape == own.shape else theirs.numel()


def _relative(expected: Tensor, found: Tensor) -> float:
    """Returns the largest difference relative to the largest magnitude; NaN and infinity count as such."""
    if expected.shape != found.shape:
        return float("inf")
    if not expected.numel():
        return 0.0
    expected, found = expected.double(), found.double()
    same = (expected == found) | (expected.isnan() & found.isnan())
    difference = torch.where(same, 0.0, (expected - found).abs()).amax()
    largest = torch.where(expected.isfinite(), expected.abs(), 0.0).amax()
    return float(np.nan_to_num(float(difference), nan=np.inf)) / (float(largest) or 1.0)
