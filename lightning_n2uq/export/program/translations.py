"""The operators of deployed layers in ONNX: one node each while torch writes, standard ones in the end.

torch's exporter simplifies a graph by patterns, which takes minutes where every quantizer is dozens of nodes.
So it sees one node per operator (`translations`), and `expand` puts standard operators in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from lightning_n2uq.export.formats.onnx_integer import SEARCH_FROM
from lightning_n2uq.export.program import operators  # noqa: F401 -- registers them with torch

DOMAIN = "n2uq_deploy"


def translations() -> dict[Any, Callable[..., Any]]:
    """Returns the table that `torch.onnx.export` takes: each operator with what writes it."""
    write_codes, write_linear, write_matmul, write_conv = (_single_node(name) for name in _OPERATORS)

    def codes(x: Any, thresholds: Any) -> Any:  # noqa: ANN401 -- values of a graph
        return write_codes(x, thresholds)

    def integer_linear(x: Any, weight: Any) -> Any:  # noqa: ANN401
        return write_linear(x, weight)

    def integer_matmul(x: Any, y: Any) -> Any:  # noqa: ANN401
        return write_matmul(x, y)

    def integer_conv(x: Any, weight: Any, stride: Any, padding: Any, dilation: Any, groups: int) -> Any:  # noqa: ANN401
        window = {"strides": list(stride), "pads": [*padding, *padding], "dilations": list(dilation)}
        return write_conv(x, weight, **window, group=groups)

    ours = torch.ops.n2uq_deploy
    return {
        ours.codes.default: codes,
        ours.integer_linear.default: integer_linear,
        ours.integer_matmul.default: integer_matmul,
        ours.integer_conv.default: integer_conv,
    }


_OPERATORS = {
    "codes": "uint8",
    "integer_linear": "int32",
    "integer_matmul": "int32",
    "integer_conv": "int32",
}
"""Names with the dtype of the output."""


def _single_node(name: str) -> Callable[..., Any]:
    """Returns what writes one node of our domain: two inputs, one output, attributes of a window."""
    from onnxscript.values import Op, Opset

    kind = onnx.defs.OpSchema
    inputs = [kind.FormalParameter("x", "X"), kind.FormalParameter("other", "C")]
    result = kind.FormalParameter("y", f"tensor({_OPERATORS[name]})")
    lists = [kind.Attribute(n, kind.AttrType.INTS, required=False) for n in ("strides", "pads", "dilations")]
    schema = kind(
        name,
        DOMAIN,
        1,
        inputs=inputs,
        outputs=[result],
        type_constraints=[
            ("X", ["tensor(float)", "tensor(uint8)"], ""),
            ("C", ["tensor(float)", "tensor(int8)", "tensor(uint8)"], ""),
        ],
        attributes=[*lists, kind.Attribute("group", kind.AttrType.INT, required=False)],
    )
    return Op(Opset(DOMAIN, 1), name, schema)


def expand(model: onnx.ModelProto) -> None:
    """Replaces the nodes of our domain by standard operators, in place."""
    graph = _Expansion(model.graph)
    for node in list(model.graph.node):
        if node.domain == DOMAIN:
            getattr(graph, node.op_type)(node)
        else:
            graph.nodes.append(node)
    del model.graph.node[:], model.graph.value_info[:]
    model.graph.node.extend(graph.nodes)
    standard = [entry for entry in model.opset_import if entry.domain != DOMAIN]
    del model.opset_import[:]
    model.opset_import.extend(standard)
    drop_unused(model.graph, [output.name for output in model.graph.output])


def drop_unused(graph: onnx.GraphProto, outputs: Iterable[str]) -> None:
    """Leaves the nodes and constants that the outputs need."""
    needed, nodes = set(outputs), []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(_read(node))
            nodes.append(node)
    constants = [constant for constant in graph.initializer if constant.name in needed]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(reversed(nodes))
    graph.initializer.extend(constants)


def _read(node: onnx.NodeProto) -> set[str]:
    """Returns what a node reads, from inside its branches and loops too."""
    names = set(node.input)
    for attribute in node.attribute:
        for graph in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
            for inner in graph.node:
                names |= _read(inner)
            names.update(output.name for output in graph.output)
    return names


class _Expansion:
    """Writes the standard operators of one graph."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.nodes: list[onnx.NodeProto] = []
        self.constants = {constant.name: constant for constant in graph.initializer}
        self._count = 0

    def codes(self, node: onnx.NodeProto) -> None:
        """Counts the thresholds that a value passes."""
        x, thresholds = node.input[0], self._array(node.input[1])
        if thresholds.size >= SEARCH_FROM:
            self._search(x, thresholds, node.output[0])
            return
        total = ""
        for index, threshold in enumerate(thresholds, 1):
            passed = self._op("Greater", [x, self._constant(threshold)])
            last = node.output[0] if index == thresholds.size else None
            one = self._cast(passed, TensorProto.UINT8, last if not total else None)
            total = self._op("Add", [total, one], last) if total else one

    def _search(self, x: str, thresholds: NDArray[Any], output: str) -> None:
        """Finds a code bit by bit; nothing exceeds what fills the table up to a power of two."""
        bits = thresholds.size.bit_length()
        missing = 2**bits - 1 - thresholds.size
        table = self._constant(np.pad(thresholds, (0, missing), constant_values=np.inf).astype(np.float32))
        zeros = self._cast(self._op("IsNaN", [x]), TensorProto.INT32)
        codes = self._op("Mul", [zeros, self._constant(np.int32(0))])
        for bit in reversed(range(bits)):
            place = self._op("Add", [codes, self._constant(np.int32(2**bit - 1))])
            passed = self._op("Greater", [x, self._op("Gather", [table, place])])
            step = self._op("Mul", [self._cast(passed, TensorProto.INT32), self._constant(np.int32(2**bit))])
            codes = self._op("Add", [codes, step])
        self._cast(codes, TensorProto.UINT8, output)

    def integer_linear(self, node: onnx.NodeProto) -> None:
        """Multiplies codes by integers."""
        weight, zero = self._unsigned(self._array(node.input[1]).T)
        inputs = [node.input[0], weight, self._constant(np.uint8(0)), zero]
        self._op("MatMulInteger", inputs, node.output[0])

    def integer_matmul(self, node: onnx.NodeProto) -> None:
        """Multiplies codes by codes."""
        zero = self._constant(np.uint8(0))
        self._op("MatMulInteger", [*node.input, zero, zero], node.output[0])

    def integer_conv(self, node: onnx.NodeProto) -> None:
        """Convolves codes with integers."""
        weight, zero = self._unsigned(self._array(node.input[1]))
        inputs = [node.input[0], weight, self._constant(np.uint8(0)), zero]
        window = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
        self._op("ConvInteger", inputs, node.output[0], **window)

    def _unsigned(self, weight: NDArray[Any]) -> tuple[str, str]:
        """Returns weights as unsigned bytes with the zero point 128.

        Products of two unsigned bytes never saturate; those of an unsigned and a signed one can, in pairs, on
        x86 processors without VNNI.
        """
        return self._constant((weight.astype(np.int16) + 128).astype(np.uint8)), self._constant(np.uint8(128))

    def _array(self, name: str) -> NDArray[Any]:
        if name not in self.constants:
            made = next(node for node in self.nodes if name in node.output)
            if made.op_type != "Constant":
                raise ValueError(f"{name}: is computed by {made.op_type}, allowed is a constant")
            return numpy_helper.to_array(helper.get_attribute_value(made.attribute[0]))
        return numpy_helper.to_array(self.constants[name])

    def _constant(self, value: NDArray[Any] | np.generic) -> str:
        self._count += 1
        name = f"{DOMAIN}/{self._count}"
        tensor = numpy_helper.from_array(np.array(value, order="C"), name)
        self.graph.initializer.append(tensor)
        return name

    def _cast(self, x: str, kind: int, name: str | None = None) -> str:
        return self._op("Cast", [x], name, to=kind)

    def _op(self, kind: str, inputs: list[str], name: str | None = None, **attributes: Any) -> str:  # noqa: ANN401
        if name is None:
            self._count += 1
            name = f"{DOMAIN}/{self._count}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name=f"{kind}:{name}", **attributes))
        return name
