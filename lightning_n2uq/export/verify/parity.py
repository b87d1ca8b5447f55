"""Parity: the exported network against the trained one, in numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_n2uq.export.ir.steps import Array, Normalize
from lightning_n2uq.export.runtime.engines import InferenceEngine, Outputs
from lightning_n2uq.export.runtime.numpy_engine import run_step
from lightning_n2uq.quantizers import UniformGrid

LOGIT_TOLERANCE = 1e-5
"""Allowed difference of logits, relative to the largest magnitude in the batch."""

FLOAT_AGREEMENT = 99.5
"""Per cent of images whose first class should be that of the float evaluation."""


@dataclass
class Tally:
    """Differences of one engine from the reference.

    Attributes:
        codes: Number of differing codes by quantizer.
        values: Number of compared codes by quantizer.
        logits: Largest difference relative to the largest magnitude.
        top1: Number of images with another first class.
    """

    codes: dict[str, int] = field(default_factory=dict)
    values: dict[str, int] = field(default_factory=dict)
    logits: float = 0.0
    top1: int = 0

    def add(self, reference: Outputs, other: Outputs) -> None:
        """Counts one batch."""
        for name, codes in reference.codes.items():
            if name in other.codes:
                different = int((codes != other.codes[name]).sum())
                self.codes[name] = self.codes.get(name, 0) + different
                self.values[name] = self.values.get(name, 0) + codes.size
        largest = float(np.abs(reference.logits).max(initial=0.0)) or 1.0
        difference = np.abs(reference.logits - other.logits).max(initial=0.0)
        # A NaN in either counts as infinitely far.
        self.logits = max(self.logits, float(np.nan_to_num(difference, nan=np.inf)) / largest)
        self.top1 += int((reference.logits.argmax(1) != other.logits.argmax(1)).sum())

    @property
    def equal(self) -> bool:
        """Whether an engine passes: same codes, same first classes, logits within the tolerance."""
        return not any(self.codes.values()) and not self.top1 and self.logits <= LOGIT_TOLERANCE

    def share(self, name: str) -> str:
        """Returns differing and compared codes of a quantizer as text."""
        return f"{self.codes[name]}/{self.values[name]}" if name in self.codes else "-"


@dataclass
class ParityReport:
    """What `compare` found.

    Attributes:
        reference: Name of the engine that the others are compared with.
        engines: Tally by engine.
        floating: Tally of the plain float modules, which may differ by roundings.
        images: Number of images.
        correct: Right answers of the reference and of the float modules, where labels are known.
    """

    reference: str
    engines: dict[str, Tally]
    floating: Tally | None = None
    images: int = 0
    correct: tuple[int, int] | None = None

    @property
    def ok(self) -> bool:
        """Whether all engines agree."""
        return all(tally.equal for tally in self.engines.values())

    def table(self) -> str:
        """Returns the report as text, one quantizer per line."""
        columns = self.engines if self.floating is None else {**self.engines, "float": self.floating}
        tallies = list(columns.values())
        rows = {"": list(columns)}
        rows.update(
            {name: [tally.share(name) for tally in tallies] for name in (tallies[0].codes if tallies else ())}
        )
        rows["largest logit difference"] = [f"{tally.logits:.1e}" for tally in tallies]
        rows["top-1 answers that differ"] = [str(tally.top1) for tally in tallies]
        width, cell = max(map(len, rows)), 2 + max(12, *(len(text) for row in rows.values() for text in row))
        lines = [f"codes that differ from {self.reference}, {self.images} images"]
        lines += [f"{name:<{width}}" + "".join(f"{c:>{cell}}" for c in row) for name, row in rows.items()]
        if self.correct is not None:
            exact, floating = (100 * right / self.images for right in self.correct)
            lines.append(f"accuracy: {exact:.2f} % integer-exact, {floating:.2f} % float")
        if self.floating is not None and self.images:
            lines.append(self._float_share(self.floating))
        return "\n".join([*lines, "parity: " + ("all engines agree" if self.ok else "MISMATCH")])

    def _float_share(self, floating: Tally) -> str:
        codes = _percent(sum(floating.codes.values()), sum(floating.values.values()))
        agreement = 100 * (1 - floating.top1 / self.images)
        note = "" if agreement >= FLOAT_AGREEMENT else f", BELOW {FLOAT_AGREEMENT} %"
        return (
            f"against the plain float modules: {codes} of the codes and "
            f"{_percent(floating.top1, self.images)} of the top-1 answers differ "
            f"(agreement {agreement:.2f} %{note})"
        )


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / max(whole, 1):.4g} %"


def compare(
    engines: Mapping[str, InferenceEngine],
    batches: Iterable[tuple[Array, NDArray[np.int64] | None]],
    floating: InferenceEngine | None = None,
) -> ParityReport:
    """Runs the same images through several engines.

    Args:
        engines: Engines by name; the first is the reference.
        batches: Images and labels, or None for unknown labels.
        floating: The plain float modules; they are reported, not required to agree.

    Raises:
        ValueError: There are no images.
    """
    reference, *others = engines
    report = ParityReport(reference, {name: Tally() for name in others}, Tally() if floating else None)
    for images, labels in batches:
        expected = engines[reference](images)
        for name in others:
            report.engines[name].add(expected, engines[name](images))
        report.images += len(images)
        if floating is not None and report.floating is not None:
            answer = floating(images)
            report.floating.add(expected, answer)
            if labels is not None:
                exact, real = (int((given.logits.argmax(1) == labels).sum()) for given in (expected, answer))
                before = report.correct or (0, 0)
                report.correct = (before[0] + exact, before[1] + real)
    if not report.images:
        raise ValueError("images: there are none to compare with")
    return report


def float_engine(model: nn.Module, normalize: Normalize | None = None) -> InferenceEngine:
    """Returns the trained model's plain float modules, with the codes of their quantizers.

    Args:
        model: The model as given to `describe`.
        normalize: What the deployed network does to its pixels first, if it takes pixels.
    """
    model = getattr(model, "backbone", model)

    def run(images: Array) -> Outputs:
        codes: dict[str, Array] = {}
        handles = [
            quantizer.register_forward_pre_hook(partial(_note, codes, name))
            for name, quantizer in _quantizers(model).items()
        ]
        training = model.training
        try:
            x = torch.from_numpy(images if normalize is None else run_step(normalize, images))
            with torch.no_grad():
                logits = model.eval()(x)
        finally:
            model.train(training)
            for handle in handles:
                handle.remove()
        return Outputs(logits.float().numpy(), codes)

    return run


def evaluation_engine(model: nn.Module, normalize: Normalize | None = None) -> InferenceEngine | None:
    """Returns a classifier's ordinary evaluation, with the codes behind its answers; sets evaluation mode.

    Args:
        model: The model as given to `describe`.
        normalize: What the deployed network does to its pixels first, if it takes pixels.

    Returns:
        None for a model that does not evaluate as deployed.
    """
    deployed = getattr(model.eval(), "deployed", None)
    if deployed is None or deployed(model.example_input_array) is None:
        return None

    def run(images: Array) -> Outputs:
        x = torch.from_numpy(images if normalize is None else run_step(normalize, images))
        with torch.no_grad():
            logits, network = model.eval()(x), deployed(x)
        if network is None:
            return float_engine(model, normalize)(images)
        codes, quantizers = network.run(x), network.description.quantizers()
        return Outputs(logits.numpy(), {step.name: codes[step.name].numpy() for step in quantizers})

    return run


def _quantizers(model: nn.Module) -> dict[str, nn.Module]:
    """Returns what quantizes maps, by the name of its step in the deployed network."""
    inside = {
        f"{name}.codes": module.activation_quantizer
        for name, module in model.named_modules()
        if hasattr(module, "activation_quantizer")
    }
    grids = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, UniformGrid) and name.endswith("_grid")
    }
    return {**inside, **grids}  # type: ignore[dict-item]


def _note(codes: dict[str, Array], name: str, quantizer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    if getattr(quantizer, "name", "float") != "float":
        found = quantizer.codes(inputs[0]).numpy()  # type: ignore[operator]
        codes[name] = found + np.int16(quantizer.low) if isinstance(quantizer, UniformGrid) else found
