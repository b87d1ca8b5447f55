"""Low-bit training on PyTorch Lightning: N2UQ quantizers and NUQSGD gradient compression."""

from lightning_n2uq._version import __version__

__all__ = ["__version__"]
