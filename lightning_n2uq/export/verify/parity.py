"""Parity: the exported network against the trained one, in numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_n2uq.export.runtime.engines import Engine, Outputs

LOGIT_TOLERANCE = 1e-5
"""Allowed difference of logits, relative to the largest magnitude in the batch."""

FLOAT_AGREEMENT = 99.5
"""Per cent of images whose first class should be that of the float evaluation."""

Images = NDArray[Any]


@dataclass
class Tally:
    """Differences of one engine from the reference.

    Attributes:
        codes: differing codes by quantizer.
        values: compared codes by quantizer.
        logits: largest difference relative to the largest magnitude.
        top1: images with another first class.
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


@dataclass
class ParityReport:
    """What `compare` found.

    Attributes:
        reference: name of the engine that the others are compared with.
        engines: tally by engine.
        floating: tally of the ordinary float evaluation, which may differ by roundings.
        images: how many were used.
        correct: right answers of the reference and of the float evaluation, where labels are known.
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

    def _float_share(self, floating: Tally) -> str:
        codes = _percent(sum(floating.codes.values()), sum(floating.values.values()))
        agreement = 100 * (1 - floating.top1 / self.images)
        note = "" if agreement >= FLOAT_AGREEMENT else f", BELOW {FLOAT_AGREEMENT} %"
        return (
            f"against the float evaluation: {codes} of the codes and {_percent(floating.top1, self.images)} "
            f"of the top-1 answers differ (agreement {agreement:.2f} %{note})"
        )

    def table(self) -> str:
        """The report as text, one quantizer per line."""
        columns = dict(self.engines)
        if self.floating is not None:
            columns["float"] = self.floating
        names = list(next(iter(columns.values())).codes) if columns else []
        width = max([len("largest logit difference"), *map(len, names)])
        shares = [_share(tally, name) for tally in columns.values() for name in names]
        cell = 2 + max([12, *map(len, shares), *map(len, columns)])
        head = "".join(f"{name:>{cell}}" for name in columns)
        lines = [f"codes that differ from {self.reference}, {self.images} images", f"{'':<{width}}{head}"]
        lines += [
            f"{name:<{width}}" + "".join(f"{_share(tally, name):>{cell}}" for tally in columns.values())
            for name in names
        ]
        numbers = "".join(f"{tally.logits:>{cell}.1e}" for tally in columns.values())
        lines.append(f"{'largest logit difference':<{width}}{numbers}")
        numbers = "".join(f"{tally.top1:>{cell}}" for tally in columns.values())
        lines.append(f"{'top-1 answers that differ':<{width}}{numbers}")
        if self.correct is not None:
            exact, floating = (100 * right / self.images for right in self.correct)
            lines.append(f"accuracy: {exact:.2f} % integer-exact, {floating:.2f} % float")
        if self.floating is not None and self.images:
            lines.append(self._float_share(self.floating))
        lines.append("parity: " + ("all engines agree" if self.ok else "MISMATCH"))
        return "\n".join(lines)


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / max(whole, 1):.4g} %"


def _share(tally: Tally, name: str) -> str:
    if name not in tally.codes:
        return "-"
    return f"{tally.codes[name]}/{tally.values[name]}"


def compare(
    engines: Mapping[str, Engine],
    batches: Iterable[tuple[Images, NDArray[np.int64] | None]],
    floating: Engine | None = None,
) -> ParityReport:
    """Runs the same images through several engines.

    Args:
        engines: by name; the first is the reference.
        batches: images and labels, or None for unknown labels.
        floating: the ordinary float evaluation; it is reported, not required to agree.

    Raises:
        ValueError: there are no images.
    """
    reference, *others = engines
    report = ParityReport(reference, {name: Tally() for name in others}, Tally() if floating else None)
    right = [0, 0]
    for images, labels in batches:
        expected = engines[reference](images)
        for name in others:
            report.engines[name].add(expected, engines[name](images))
        report.images += len(images)
        if floating is not None and report.floating is not None:
            answer = floating(images)
            report.floating.add(expected, answer)
            if labels is not None:
                right[0] += int((expected.logits.argmax(1) == labels).sum())
                right[1] += int((answer.logits.argmax(1) == labels).sum())
                report.correct = (right[0], right[1])
    if not report.images:
        raise ValueError("images: there are none to compare with")
    return report


def float_engine(model: nn.Module, prepare: Callable[[Tensor], Tensor] | None = None) -> Engine:
    """The trained model's own evaluation, with the codes of its quantizers.

    Args:
        model: as given to `describe`.
        prepare: applied to the images first.
    """
    model = getattr(model, "backbone", model)

    def run(images: Images) -> Outputs:
        codes: dict[str, Images] = {}
        handles = [
            module.activation_quantizer.register_forward_pre_hook(partial(_note, codes, f"{name}.codes"))
            for name, module in model.named_modules()
            if hasattr(module, "activation_quantizer")
        ]
        training = model.training
        try:
            x = torch.from_numpy(images)
            with torch.no_grad():
                logits = model.eval()(x if prepare is None else prepare(x))
        finally:
            model.train(training)
            for handle in handles:
                handle.remove()
        return Outputs(logits.float().numpy(), codes)

    return run


def _note(codes: dict[str, Images], name: str, quantizer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    if getattr(quantizer, "name", "float") != "float":
        codes[name] = quantizer.codes(inputs[0]).numpy()  # type: ignore[operator]
