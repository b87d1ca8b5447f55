"""The documented import path of the ONNX writer; the code is in `formats.onnx_file`."""

from lightning_n2uq.export.formats.onnx_file import save_onnx, to_onnx

__all__ = ["save_onnx", "to_onnx"]
