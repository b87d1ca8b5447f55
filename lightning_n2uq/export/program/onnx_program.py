"""ONNX files of networks of any structure, by torch's exporter with translations for integer layers."""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import helper
from torch import Tensor, nn

from lightning_n2uq.export.formats.onnx_graph import save_model
from lightning_n2uq.export.program.deployed import Deployed, deploy
from lightning_n2uq.export.program.detectors import traceable_detectors
from lightning_n2uq.export.program.traces import Trace, tracing
from lightning_n2uq.export.program.translations import drop_unused, expand, translations
from lightning_n2uq.utils.compat import tree_leaves

_SEVERAL = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
OPSET = 20
"""Version of the standard operators."""
CODES = "codes/"
INPUTS = "inputs/"
CHOICES = "choices/"
"""Prefixes of the outputs by which a file is compared, see `explain`."""


@dataclass(frozen=True)
class Inputs:
    """What a network is called with.

    Attributes:
        arguments: By position.
        keywords: By name.
    """

    arguments: tuple[Any, ...]
    keywords: dict[str, Any] = field(default_factory=dict)

    def call(self, model: nn.Module) -> list[Tensor]:
        """Returns the tensors in the network's output."""
        return tensors(model(*self.arguments, **self.keywords))

    def tensors(self) -> list[Tensor]:
        """Returns the tensors in the order of a file's inputs."""
        return tensors([self.arguments, self.keywords])

    def names(self, model: nn.Module) -> list[str]:
        """Returns the names of these tensors: those of `forward`, numbered where one holds several."""
        parameters = [p for p in signature(model.forward).parameters.values() if p.kind not in _SEVERAL]
        own = [p.name for p in parameters] + [
            f"input{i}" for i in range(len(parameters), len(self.arguments))
        ]
        values = {**dict(zip(own, self.arguments, strict=False)), **self.keywords}
        held = {name: len(tensors([value])) for name, value in values.items()}
        return [name if n == 1 else f"{name}_{i}" for name, n in held.items() for i in range(n)]


@dataclass(frozen=True)
class ExportedProgram:
    """A network as an ONNX file, with what it was made from.

    Attributes:
        model: The file, with the outputs of the network only.
        watched: The same with codes and inputs of every quantizer as further outputs.
        deployed: The network that it was traced from.
        inputs: What the network was called with while it was traced.
        dynamic: Whether the batch size is open.
    """

    model: onnx.ModelProto
    watched: onnx.ModelProto
    deployed: Deployed
    inputs: Inputs
    dynamic: bool

    def save(self, path: str | Path) -> None:
        """Writes the file."""
        save_model(self.model, path)


class _Watched(nn.Module):
    """A network that also returns what its quantizers saw; all inputs come by position.

    Args:
        model: The network.
        keywords: Names of the last inputs, which the network gets by name.
    """

    def __init__(self, model: nn.Module, keywords: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.keywords = tuple(keywords)

    def forward(self, *values: Any) -> tuple[list[Tensor], dict[str, Tensor]]:  # noqa: ANN401
        count = len(values) - len(self.keywords)
        named = dict(zip(self.keywords, values[count:], strict=True))
        with tracing() as trace:
            outputs = tensors(self.model(*values[:count], **named))
        return outputs, seen_in(trace)


def seen_in(trace: Trace) -> dict[str, Tensor]:
    """Returns what a trace has seen by the names of a file's outputs, in their order."""
    kinds = {INPUTS: trace.inputs, CODES: trace.codes, CHOICES: trace.choices}
    return {prefix + name: x for prefix, found in kinds.items() for name, x in found.items()}


def tensors(outputs: Any) -> list[Tensor]:  # noqa: ANN401 -- whatever a network returns
    """Returns the floating tensors in a network's output, in order, whatever holds them."""
    leaves = tree_leaves(dict(outputs) if hasattr(outputs, "items") else outputs)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def export_program(
    model: nn.Module,
    *arguments: Any,  # noqa: ANN401 -- whatever the network takes
    keywords: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
    output: str = "output",
) -> ExportedProgram:
    """Exports a trained network of any structure that torch can trace.

    Quantized layers become integers: codes by comparison with thresholds, sums of integers, one
    multiplication per channel. Everything else is what torch's exporter makes of it, in float32.

    Args:
        model: The network, with layers of `quantize_model` or of this package; it is left as it is.
        arguments: What to call it with, tensors with the batch along their first axis. The file takes other
            batch sizes where this one is above 1 and the network allows it.
        keywords: Further arguments by name.
        metadata: Texts to keep with the network.
        output: The name of the file's output; further ones get a number behind it.

    Raises:
        ValueError: Nothing is quantized, a quantizer was never fitted, or torch cannot trace or write the
            network; the message says what torch said.
    """
    deployed, inputs = deploy(model), Inputs(arguments, dict(keywords or {}))
    watched = _Watched(deployed.model, list(inputs.keywords)).eval()
    with traceable_detectors(deployed.model):
        with torch.no_grad(), tracing() as trace:
            outputs = inputs.call(deployed.model)
        program, dynamic = _traced(watched, (*inputs.arguments, *inputs.keywords.values()))
    names = [f"{output}{index}" if index else output for index in range(len(outputs))]
    # In the order of the traced outputs: a dict keeps the order of its keys.
    file = _written(program, inputs.names(deployed.model), [*names, *seen_in(trace)])
    helper.set_model_props(file, dict(metadata or {}))
    return ExportedProgram(_cut(file, names), file, deployed, inputs, dynamic)


def _traced(model: nn.Module, values: tuple[Any, ...]) -> tuple[torch.export.ExportedProgram, bool]:
    """Traces with an open batch size, and open lengths of integers (tokens), as far as the network allows."""
    batches = {len(value) for value in values if isinstance(value, Tensor) and value.dim()}
    tries = [_all_of_integers, _batch, None] if len(batches) == 1 and batches != {1} else [None]
    reason: Exception | None = None
    for open_axes in tries:
        axes = None if open_axes is None else {"values": tuple(map(open_axes, values))}
        try:
            with warnings.catch_warnings(), torch.no_grad(), _quiet_failure():
                warnings.simplefilter("ignore")
                program = torch.export.export(model, values, dynamic_shapes=axes, strict=False)
            return program, axes is not None and bool(program.range_constraints)
        except Exception as error:  # tracing runs the network's own code, which may raise anything
            reason = error
    raise ValueError(f"model: cannot be traced by torch.export ({_first_line(reason)})") from reason


@contextmanager
def _quiet_failure() -> Iterator[None]:
    """Drops what is written to stderr where the block fails: torch prints the whole graph so far."""
    written = io.StringIO()
    with redirect_stderr(written):
        yield
    sys.stderr.write(written.getvalue())


def _batch(value: Any) -> dict[int, Any] | None:  # noqa: ANN401
    """Returns the first axis of a tensor as one whose size is open."""
    return {0: torch.export.Dim.AUTO} if isinstance(value, Tensor) and value.dim() else None


def _all_of_integers(value: Any) -> dict[int, Any] | None:  # noqa: ANN401
    """Returns all axes of a tensor of integers as open: a text has any length."""
    if not isinstance(value, Tensor) or value.is_floating_point():
        return _batch(value)
    return {axis: torch.export.Dim.AUTO for axis, size in enumerate(value.shape) if size > 1}


def _written(program: torch.export.ExportedProgram, inputs: list[str], outputs: list[str]) -> onnx.ModelProto:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            written = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                input_names=inputs,
                output_names=outputs,
                custom_translation_table=translations(),
            )
    except Exception as error:
        raise ValueError(f"model: torch.onnx cannot write it ({_first_line(error)})") from error
    assert written is not None
    model = written.model_proto
    expand(model)
    return model


def _first_line(error: Exception | None) -> str:
    """Returns what an error says in one line; torch's exporter says it behind a heading."""
    text = str(error).rpartition("## Exception summary")[2]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _cut(model: onnx.ModelProto, outputs: Sequence[str]) -> onnx.ModelProto:
    """Returns the model with these outputs only, and with the nodes that they need."""
    cut = onnx.ModelProto()
    cut.CopyFrom(model)
    kept = [output for output in cut.graph.output if output.name in set(outputs)]
    del cut.graph.output[:]
    cut.graph.output.extend(kept)
    drop_unused(cut.graph, outputs)
    return cut
