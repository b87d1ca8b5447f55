"""What error feedback still owes, and the layout it was kept in: the part of a checkpoint a resume needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Layout = tuple[tuple[str, ...], ...]
"""Names of the parameters of every bucket, in the order of its buffer."""


@dataclass
class Owed:
    """Residuals of one rank by parameter (fp32, flat).

    A residual belongs to one leg of the exchange and is added to what that leg sends. Where buckets are
    laid out anew there is no such place; the residual is then counted as part of this rank's gradient.

    Attributes:
        gradient: What is added to this rank's next gradient.
        legs: For each leg that compresses, what is added to what it sends; zero where another rank does.
        averaged: For each of these legs, of how many ranks' gradients it sends the mean.
        layout: Of the buckets in which ``legs`` were kept; empty if unknown.
        geometry: Settings that decide which rank holds what of ``legs``.
    """

    gradient: dict[str, Tensor] = field(default_factory=dict)
    legs: list[dict[str, Tensor]] = field(default_factory=list)
    averaged: list[int] = field(default_factory=list)
    layout: Layout = ()
    geometry: dict[str, Any] = field(default_factory=dict)

    def move_to_gradient(self) -> None:
        """Count the legs' residuals as part of the gradient: an error in a mean over ``w`` ranks ``w`` times.

        The mean over ranks of all gradients' residuals, which is what the parameters miss, stays the same.
        """
        for residuals, averaged in zip(self.legs, self.averaged, strict=True):
            for name, residual in residuals.items():
                start = self.gradient.get(name)
                zero = torch.zeros_like(residual) if start is None else start
                self.gradient[name] = zero.add(residual, alpha=averaged)
        self.legs, self.averaged = [], []

    def export(self) -> dict[str, Any]:
        """Return plain containers with copies on the CPU, which ``torch.load(weights_only=True)`` reads."""
        return {
            "gradient": _copies(self.gradient),
            "legs": [_copies(leg) for leg in self.legs],
            "averaged": list(self.averaged),
            "layout": [list(names) for names in self.layout],
            "geometry": dict(self.geometry),
        }

    @staticmethod
    def restore(saved: Mapping[str, Any]) -> Owed:
        """Return what :meth:`export` saved."""
        return Owed(
            _copies(saved["gradient"]),
            [_copies(leg) for leg in saved["legs"]],
            [int(ranks) for ranks in saved["averaged"]],
            as_layout(saved["layout"]),
            dict(saved["geometry"]),
        )


def as_layout(buckets: Sequence[Sequence[str]]) -> Layout:
    """Return the layout as tuples."""
    return tuple(tuple(names) for names in buckets)


def _copies(residuals: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: residual.detach().to("cpu", copy=True) for name, residual in residuals.items()}
