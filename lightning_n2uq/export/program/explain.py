"""Why two ways of computing one quantized network differ: by codes at thresholds, or by a bug.

Floating-point sums depend on their order, and one rounding beside a threshold moves a code, which moves what
follows. So the second network is run once more with the first one's codes put in: then every value in front
of a quantizer must agree within roundings, and every code must be the one that the second network's own value
gets. What is left of the difference comes from codes at thresholds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from lightning_n2uq.export.program.layers import DeployedQuantizer
from lightning_n2uq.export.program.onnx_program import CODES, INPUTS, ExportedProgram, Inputs
from lightning_n2uq.export.program.traces import tracing

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
    codes = {k.removeprefix(CODES): v for k, v in results.items() if k.startswith(CODES)}
    values = {k.removeprefix(INPUTS): v for k, v in results.items() if k.startswith(INPUTS)}
    outputs = [v for k, v in results.items() if not k.startswith((CODES, INPUTS))]
    return _compare(program, inputs, outputs, values, codes)


@torch.no_grad()
def explain_modules(program: ExportedProgram, model: nn.Module, inputs: Inputs | None = None) -> Explanation:
    """Compares the plain float modules of the trained network with the network that was deployed from it.

    Args:
        program: What was exported.
        model: The trained network.
        inputs: What to call both with; None for the inputs of the export.
    """
    inputs, training, handles = inputs or program.inputs, model.training, []
    with tracing() as seen:
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
    return _compare(program, inputs, outputs, seen.inputs, seen.codes)


def _noting(note: Callable[[str, Tensor, Tensor], Tensor], name: str) -> Callable[..., None]:
    def hook(quantizer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        x = arguments[0].detach().float().contiguous()
        note(name, x, quantizer.codes(x))  # type: ignore[operator]

    return hook


def _compare(
    program: ExportedProgram,
    inputs: Inputs,
    outputs: list[Tensor],
    values: Mapping[str, Tensor],
    codes: Mapping[str, Tensor],
) -> Explanation:
    """Compares a network, known by its outputs and by what its quantizers saw, with the deployed one."""
    network = program.deployed.model
    stairs = {m.name: m for m in network.modules() if isinstance(m, DeployedQuantizer)}
    with tracing() as free:
        freely = inputs.call(network)
    with tracing(forced=codes) as forced:
        with_codes = inputs.call(network)
    report = Explanation()
    report.free = max(map(_relative, outputs, freely), default=0.0)
    report.forced = max(map(_relative, outputs, with_codes), default=0.0)
    for name, theirs in codes.items():
        own = torch.searchsorted(stairs[name.partition("#")[0]].thresholds, values[name].contiguous())
        report.layers.append(
            Difference(
                name,
                theirs.numel(),
                int((theirs != free.codes[name]).sum()),
                _relative(values[name], forced.inputs[name]),
                int((own != theirs).sum()),
            )
        )
    return report


def _relative(expected: Tensor, found: Tensor) -> float:
    """Returns the largest difference relative to the largest magnitude; NaN and infinity count as such."""
    if not expected.numel():
        return 0.0
    expected, found = expected.double(), found.double()
    same = (expected == found) | (expected.isnan() & found.isnan())
    difference = torch.where(same, 0.0, (expected - found).abs()).amax()
    largest = torch.where(expected.isfinite(), expected.abs(), 0.0).amax()
    return float(np.nan_to_num(float(difference), nan=np.inf)) / (float(largest) or 1.0)
