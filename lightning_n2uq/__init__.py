"""Low-bit training on PyTorch Lightning: N2UQ quantizers and NUQSGD gradient compression."""

from typing import Any

from lightning_n2uq._version import __version__

__all__ = ["__version__", "quantize"]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """Imports torch only when `quantize` is asked for."""
    if name != "quantize":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lightning_n2uq.convert.record import quantize

    return quantize
