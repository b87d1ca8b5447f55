"""Looks: forward passes that nothing is to be learned from, even in training mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_open_looks = 0


@contextmanager
def looking() -> Iterator[None]:
    """Says that forward passes inside are looks: no quantizer takes its first values from their data."""
    global _open_looks
    _open_looks += 1
    try:
        yield
    finally:
        _open_looks -= 1


def is_look() -> bool:
    """Returns whether a forward pass now is a look: inside `looking`, or traced or exported by torch."""
    return _open_looks > 0 or is_traced()


def is_traced() -> bool:
    """Returns whether torch traces or exports: no value of a tensor can be read then."""
    tracing = bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]
    return tracing or torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export()
