"""What a ResNet-18 can be deployed with: engines of others and of this package, each as something to run."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lightning_n2uq.backbones import resnet18
from lightning_n2uq.export import Description, describe
from lightning_n2uq.layers import BiasedPReLU
from lightning_n2uq.quantizers import LearnableThresholdQuantizer

Images = NDArray[np.float32]
Opener = Callable[[int, Images], Callable[[], object]]
"""Opens an engine for a number of threads and a batch of images, and returns what runs that batch."""


def float_file(size: int) -> bytes:
    """Torchvision's network as torch writes it, batch norms folded by onnxruntime itself."""
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.resnet18().eval()
    file = io.BytesIO()
    example = torch.randn(2, 3, size, size)
    program = torch.onnx.export(
        model, (example,), dynamo=True, verbose=False, dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    program.save(file)  # type: ignore[union-attr]
    return file.getvalue()


def static_int8_file(float_model: bytes, images: Images) -> bytes:
    """The float file after onnxruntime's static quantization, calibrated on the images one by one.

    Quantize and dequantize nodes, 8-bit weights per channel, unsigned 8-bit activations: what its
    documentation advises for speed on x86.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self, name: str) -> None:
            self.feeds: Iterator[dict[str, Images]] = ({name: image[None]} for image in images)

        def get_next(self) -> dict[str, Images] | None:
            return next(self.feeds, None)

    with tempfile.TemporaryDirectory() as folder:
        source, prepared, target = (str(Path(folder) / f"{n}.onnx") for n in ("source", "prepared", "target"))
        Path(source).write_bytes(float_model)
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            target,
            Reader(open_session(float_model, 1).get_inputs()[0].name),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        return Path(target).read_bytes()


def trained_network(bits: int, size: int, grid_bits: int | None = None) -> nn.Module:
    """This package's network, with uneven thresholds as after training; integer-only with `grid_bits`."""
    torch.manual_seed(0)
    model = resnet18(bits, bits, residual_bits=grid_bits, first_last_bits=grid_bits)
    for module in model.modules():
        if isinstance(module, LearnableThresholdQuantizer):
            nn.init.uniform_(module.widths, 1.0 / module.num_levels, 3.0 / module.num_levels)
        if isinstance(module, BiasedPReLU):
            nn.init.normal_(module.bias_in, 0, 0.1)
            nn.init.normal_(module.bias_out, 0, 0.1)
    with torch.no_grad():
        for _ in range(3):
            model.train()(torch.randn(4, 3, size, size))
    return model.eval()


def integer_network(bits: int, size: int, grid_bits: int | None = None) -> Description:
    """`trained_network`, deployed."""
    return describe(trained_network(bits, size, grid_bits), (3, size, size))


def open_session(model: bytes, threads: int, profile: str | None = None) -> Any:
    """An onnxruntime session, which writes a profile if a prefix for it is given."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, profile
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def onnxruntime_opener(model: bytes) -> Opener:
    """An ONNX file in onnxruntime, with its default options."""

    def open_engine(threads: int, images: Images) -> Callable[[], object]:
        session = open_session(model, threads)
        name = session.get_inputs()[0].name
        return lambda: session.run(None, {name: images})

    return open_engine


def openvino_opener(model: bytes) -> Opener:
    """An ONNX file in openvino, for the shape of the images."""

    def open_engine(threads: int, images: Images) -> Callable[[], object]:
        import openvino

        core = openvino.Core()
        network = core.read_model(io.BytesIO(model))
        network.reshape(images.shape)
        settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        request = core.compile_model(network, "CPU", settings).create_infer_request()
        return lambda: request.infer([images])

    return open_engine


def pt2_opener(path: Path) -> Opener:
    """A compiled package; its number of threads is torch's."""

    def open_engine(threads: int, images: Images) -> Callable[[], object]:
        from lightning_n2uq.export.formats.pt2_file import load_pt2

        run, tensor = load_pt2(path), torch.from_numpy(images)
        return _with_threads(threads, lambda: run(tensor))

    return open_engine


def fast_opener(description: Description) -> Opener:
    """`FastNetwork`, the evaluation by integer kernels in Python."""

    def open_engine(threads: int, images: Images) -> Callable[[], object]:
        from lightning_n2uq.export import FastNetwork

        network, tensor = FastNetwork(description), torch.from_numpy(images)
        return _with_threads(threads, lambda: network(tensor))

    return open_engine


def _with_threads(threads: int, run: Callable[[], object]) -> Callable[[], object]:
    def call() -> object:
        torch.set_num_threads(threads)
        return run()

    return call
