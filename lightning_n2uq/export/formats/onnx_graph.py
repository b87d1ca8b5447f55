"""A small writer of ONNX graphs: nodes, constants without duplicates, and the memory layout of values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from lightning_n2uq.export.ir.description import Description
from lightning_n2uq.export.ir.packing import pack
from lightning_n2uq.export.ir.shapes import infer_shapes
from lightning_n2uq.utils.atomic import replacing

TensorLayout = Literal["NCHW", "NHWC", "flat"]
PERMUTATIONS = {"NHWC": [0, 2, 3, 1], "NCHW": [0, 3, 1, 2]}
IR_VERSIONS = {21: 10, 25: 12}
"""Oldest file version that knows the operator set."""


class GraphWriter:
    """Collects the nodes of one graph. A step's value is the tensor of the step's name.

    Args:
        description: The network to write.
        layout: Layout that integer convolutions prefer.
        opset: Version of the standard operators.

    Attributes:
        shapes: Shapes of the steps' outputs, `(C, H, W)` or `(F,)`, whatever their layout.
        layouts: How each step's value lies in memory.
        integers: Names of the steps whose value is a tensor of integer dtype.
    """

    def __init__(self, description: Description, layout: TensorLayout, opset: int) -> None:
        self.description = description
        self.layout = layout
        self.opset = opset
        self.shapes = infer_shapes(description.steps)
        self.layouts: dict[str, TensorLayout] = {}
        self.integers: set[str] = set()
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[tuple[bytes, str, tuple[int, ...]], onnx.TensorProto] = {}
        self._derived: dict[tuple[str, str], str] = {}
        self._count = 0

    def op(self, kind: str, inputs: Iterable[str], name: str | None = None, **attributes: Any) -> str:  # noqa: ANN401
        """Adds a node with one output and returns the output's name (made up if None)."""
        if name is None:
            self._count += 1
            name = f"tmp/{kind}/{self._count}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=f"{kind}:{name}", **attributes))
        return name

    def const(self, array: NDArray[Any] | np.generic) -> str:
        """Returns the name of a constant; equal ones are stored once."""
        array = np.asarray(array)
        key = (array.tobytes(), array.dtype.str, array.shape)
        if key not in self.constants:
            array = np.array(array, order="C")
            self.constants[key] = numpy_helper.from_array(array, f"const/{len(self.constants)}")
        return self.constants[key].name

    def packed(self, codes: NDArray[np.uint8], bits: int) -> str:
        """Returns the name of a constant of unsigned 2- or 4-bit integers; equal ones are stored once."""
        data = pack(codes, bits).tobytes()
        key = (data, f"u{bits}", codes.shape)
        if key not in self.constants:
            kind = TensorProto.UINT2 if bits == 2 else TensorProto.UINT4
            tensor = onnx.TensorProto(name=f"const/{len(self.constants)}", data_type=kind, dims=codes.shape)
            tensor.raw_data = data
            self.constants[key] = tensor
        return self.constants[key].name

    def ints(self, *values: int) -> str:
        """Returns the name of an int64 vector."""
        return self.const(np.array(values, np.int64))

    def cast(self, name: str, kind: int, output: str | None = None) -> str:
        """Adds a conversion to an ONNX dtype."""
        return self.op("Cast", [name], output, to=kind)

    def in_layout(self, name: str, layout: TensorLayout) -> str:
        """Returns the step's value in another layout; the transposition is added once."""
        if self.layouts[name] in (layout, "flat"):
            return name
        key = (name, layout)
        if key not in self._derived:
            self._derived[key] = self.op("Transpose", [name], perm=PERMUTATIONS[layout])
        return self._derived[key]

    def channelwise(self, array: NDArray[Any], layout: TensorLayout) -> str:
        """Returns a constant `[C]` shaped to go with a value in this layout."""
        return self.const(array.reshape(-1, 1, 1) if layout == "NCHW" else array.reshape(-1))

    def repeated(self, array: NDArray[Any], step: str, layout: TensorLayout) -> str:
        """Does what `channelwise` does, in `NHWC` what `wide` does, for the value of this step."""
        if layout != "NHWC" or array.size == 1:
            return self.channelwise(array, layout)
        return self.wide(array, self.shapes[step][2])

    def wide(self, array: NDArray[Any], width: int) -> str:
        """Returns a per-channel constant `[C]` repeated along a row of an `NHWC` image, `[width, C]`.

        onnxruntime's elementwise kernels start anew for each run of a broadcast operand: on 64 channels
        that nearly doubles their time. The file holds the `C` values, repeated when it is loaded.
        """
        plain = self.const(array.reshape(-1))
        if array.size >= 512 or width == 1:
            return plain
        key = (plain, str(width))
        if key not in self._derived:
            self._derived[key] = self.op("Expand", [plain, self.ints(width, array.size)])
        return self._derived[key]

    def file(
        self, outputs: Mapping[str, int], domains: Mapping[str, int], batch: int | None = None
    ) -> onnx.ModelProto:
        """Returns the finished model.

        Args:
            outputs: Names of steps, with the ONNX dtype of their values.
            domains: Operator set versions by domain.
            batch: Size of the batch; None leaves it open.
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
        return (*shape[1:], shape[0]) if self.layouts[name] == "NHWC" else shape


def save_model(model: onnx.ModelProto, path: str | Path) -> None:
    """Writes a model to a file, which is there as a whole or not at all."""
    with replacing(path) as partial:
        partial.write_bytes(model.SerializeToString())
