"""A small writer of ONNX graphs: nodes, constants without duplicates, and the memory layout of values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from lightning_n2uq.export.ir.description import Description
from lightning_n2uq.export.ir.shapes import infer_shapes

Layout = Literal["NCHW", "NHWC", "flat"]
PERMUTATIONS = {"NHWC": [0, 2, 3, 1], "NCHW": [0, 3, 1, 2]}
IR_VERSIONS = {21: 10, 25: 12}
"""Oldest file version that knows the operator set."""


class GraphWriter:
    """Collects the nodes of one graph. A step's value is the tensor of the step's name.

    Args:
        description: the network to write.
        layout: layout that integer convolutions prefer.
        opset: version of the standard operators.

    Attributes:
        shapes: of the steps' outputs, `(C, H, W)` or `(F,)`, whatever their layout.
        layouts: how each step's value lies in memory.
        integers: steps whose value is a tensor of integer dtype.
    """

    def __init__(self, description: Description, layout: Layout, opset: int) -> None:
        self.description = description
        self.layout = layout
        self.opset = opset
        self.shapes = infer_shapes(description.steps)
        self.layouts: dict[str, Layout] = {}
        self.integers: set[str] = set()
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[tuple[bytes, str, tuple[int, ...]], onnx.TensorProto] = {}
        self._turned: dict[tuple[str, str], str] = {}
        self._count = 0

    def op(self, kind: str, inputs: Iterable[str], name: str | None = None, **attributes: Any) -> str:  # noqa: ANN401
        """Adds a node with one output and returns the output's name (made up if None)."""
        if name is None:
            self._count += 1
            name = f"tmp/{kind}/{self._count}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=f"{kind}:{name}", **attributes))
        return name

    def const(self, array: NDArray[Any] | np.generic) -> str:
        """Name of a constant; equal ones are stored once."""
        array = np.asarray(array)
        key = (array.tobytes(), array.dtype.str, array.shape)
        if key not in self.constants:
            array = np.array(array, order="C")
            self.constants[key] = numpy_helper.from_array(array, f"const/{len(self.constants)}")
        return self.constants[key].name

    def packed(self, codes: NDArray[np.uint8], bits: int) -> str:
        """Name of a constant of unsigned 2- or 4-bit integers."""
        per_byte = 8 // bits
        flat = np.zeros(-(-codes.size // per_byte) * per_byte, np.uint8)
        flat[: codes.size] = codes.reshape(-1)
        shifted = flat.reshape(-1, per_byte) << (np.arange(per_byte, dtype=np.uint8) * bits)
        kind = TensorProto.UINT2 if bits == 2 else TensorProto.UINT4
        tensor = onnx.TensorProto(name=f"const/{len(self.constants)}", data_type=kind, dims=codes.shape)
        tensor.raw_data = np.bitwise_or.reduce(shifted, axis=1).astype(np.uint8).tobytes()
        self.constants[(tensor.raw_data, f"u{bits}", codes.shape)] = tensor
        return tensor.name

    def ints(self, *values: int) -> str:
        """Name of an int64 vector."""
        return self.const(np.array(values, np.int64))

    def cast(self, name: str, kind: int, output: str | None = None) -> str:
        """Adds a conversion to an ONNX dtype."""
        return self.op("Cast", [name], output, to=kind)

    def in_layout(self, name: str, layout: Layout) -> str:
        """The step's value in another layout; the transposition is added once."""
        if self.layouts[name] in (layout, "flat"):
            return name
        key = (name, layout)
        if key not in self._turned:
            self._turned[key] = self.op("Transpose", [name], perm=PERMUTATIONS[layout])
        return self._turned[key]

    def channelwise(self, array: NDArray[Any], layout: Layout) -> str:
        """A constant `[C]` shaped to go with a value in this layout."""
        return self.const(array.reshape(-1, 1, 1) if layout == "NCHW" else array.reshape(-1))

    def repeated(self, array: NDArray[Any], step: str, layout: Layout) -> str:
        """`channelwise`, in `NHWC` as `wide`, to go with the value of this step."""
        if layout != "NHWC" or array.size == 1:
            return self.channelwise(array, layout)
        return self.wide(array, self.shapes[step][2])

    def wide(self, array: NDArray[Any], width: int) -> str:
        """A per-channel constant `[C]` repeated along a row of an `NHWC` image, `[width, C]`.

        onnxruntime's elementwise kernels start anew for each run of a broadcast operand: on 64 channels
        that nearly doubles their time. The file holds the `C` values, repeated when it is loaded.
        """
        plain = self.const(array.reshape(-1))
        if array.size >= 512 or width == 1:
            return plain
        key = (plain, str(width))
        if key not in self._turned:
            self._turned[key] = self.op("Expand", [plain, self.ints(width, array.size)])
        return self._turned[key]

    def shape_of(self, name: str) -> str:
        """The shape of a value, known when the network runs."""
        return self.op("Shape", [name])

    def file(
        self, outputs: Mapping[str, int], domains: Mapping[str, int], batch: int | None = None
    ) -> onnx.ModelProto:
        """The finished model.

        Args:
            outputs: names of steps, with the ONNX dtype of their values.
            domains: operator set versions by domain.
            batch: size of the batch; None leaves it open.
        """
        size = "batch" if batch is None else batch
        first = self.description.input
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(first.dtype))
        graph = helper.make_graph(
            self.nodes,
            "network",
            [helper.make_tensor_value_info(first.name, kind, [size, *first.shape])],
            [helper.make_tensor_value_info(n, kind, [size, *self._dims(n)]) for n, kind in outputs.items()],
            list(self.constants.values()),
        )
        opsets = [helper.make_opsetid(domain, version) for domain, version in domains.items()]
        version = next(ir for opset, ir in IR_VERSIONS.items() if self.opset <= opset)
        model = helper.make_model(
            graph, opset_imports=opsets, producer_name="lightning_n2uq", ir_version=version
        )
        helper.set_model_props(model, self.description.metadata)
        return model

    def _dims(self, name: str) -> tuple[int, ...]:
        shape = self.shapes[name]
        if self.layouts[name] == "NHWC":
            shape = (*shape[1:], shape[0])
        return shape
