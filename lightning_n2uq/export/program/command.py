"""`n2uq export` for networks that have no form by steps: torch's exporter writes, and parity is explained."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from lightning_n2uq.checkpointing.reading import read_file
from lightning_n2uq.export.ir.description import OUTPUT
from lightning_n2uq.export.lower.checkpoint import run_metadata
from lightning_n2uq.export.program.explain import explain_file, explain_modules
from lightning_n2uq.export.program.modules import load_run, run_batches
from lightning_n2uq.export.program.onnx_program import ExportedProgram, Inputs, export_program
from lightning_n2uq.export.verify.data import run_data, verification_batches
from lightning_n2uq.utils.class_names import KEY
from lightning_n2uq.utils.version import __version__

_BY_STEPS = {
    "mean": None,
    "pixels": False,
    "std": None,
    "sweep": None,
    "engines": None,
    "batch": None,
    "opset": None,
    "convolution": "matmul",
}
"""Options that only the form by steps has, with their defaults."""


def run(
    model: nn.Module,
    shape: tuple[int, int, int],
    metadata: dict[str, str],
    arguments: argparse.Namespace,
    reason: str,
) -> int:
    """Writes the file, and compares it where asked.

    Args:
        model: The trained network, a module with one as `backbone`, or any other one.
        shape: Shape `(C, H, W)` of the images.
        metadata: Texts to keep with the network.
        arguments: The command's.
        reason: Why the network is not written by steps.

    Returns:
        0, or 1 where something differs that codes at thresholds do not explain.

    Raises:
        ValueError: The network cannot be written, or an option has no meaning here; one line.
    """
    _check_options(arguments, reason)
    network = getattr(model, "backbone", model)
    program = export_program(network, torch.zeros(2, *shape), metadata=metadata, output=OUTPUT)
    _save(program, arguments, reason)
    if arguments.verify is None:
        return 0
    source, root = run_data(arguments.verify, arguments.verify_root, arguments.ckpt)
    classes, size = json.loads(metadata.get(KEY, "null")), 64 if program.dynamic else 2
    batches = verification_batches(source, shape, arguments.verify_images, size, root, classes)
    return _compared(program, network, (Inputs((torch.from_numpy(images),)) for images, _ in batches))


def run_module(arguments: argparse.Namespace) -> int:
    """Writes a LightningModule that `QuantizeModel` has quantized; returns and raises as `run`.

    `--verify run` compares over the run's own batches, `--verify-images` of them at most.
    """
    _check_options(arguments, "it is a LightningModule of another package")
    if arguments.format != "onnx" or arguments.exporter == "steps":
        wanted = f"format {arguments.format}, exporter {arguments.exporter}"
        raise ValueError(
            f"format: got {wanted} for a module that QuantizeModel has quantized, allowed is onnx"
        )
    if arguments.verify not in (None, "run") or arguments.verify_root is not None:
        raise ValueError(
            f"verify: got {arguments.verify!r} for a module that QuantizeModel has quantized, allowed is run"
        )
    built, inputs = load_run(arguments.ckpt)
    module = built.model
    metadata = {"module": type(module).__name__, "package": f"lightning_n2uq {__version__}"}
    metadata.update(run_metadata(read_file(arguments.ckpt, "ckpt", mmap=True)))
    program = export_program(module, *inputs.arguments, keywords=inputs.keywords, metadata=metadata)
    _save(program, arguments, f"{type(module).__name__} is a LightningModule of its own")
    if arguments.verify is None:
        return 0
    return _compared(program, module, run_batches(built, arguments.verify_images))


def _save(program: ExportedProgram, arguments: argparse.Namespace, reason: str) -> None:
    print(f"by torch's exporter: {reason}\n{program.deployed.summary()}")
    program.save(arguments.output)
    batch = "any" if program.dynamic else f"{_size(program.inputs)} only, as the network fixes it"
    print(f"wrote {arguments.output}: {Path(arguments.output).stat().st_size:,} bytes, batch size {batch}")


def _size(inputs: Inputs) -> int:
    first = inputs.arguments[0] if inputs.arguments else None
    return len(first) if isinstance(first, list) else len(inputs.tensors()[0])


def _parts(inputs: Inputs, traced: Inputs) -> list[Inputs]:
    """Returns a batch as the file takes it: a list of images in pieces as long as the traced list."""
    if len(inputs.arguments) != 1 or not isinstance(inputs.arguments[0], (list, tuple)):
        return [inputs]
    images, count = list(inputs.arguments[0]), _size(traced)
    return [Inputs((images[start : start + count],)) for start in range(0, len(images), count)]


def _fits(inputs: Inputs, program: ExportedProgram) -> bool:
    """Returns whether the file takes these inputs; one of a fixed size does not take the rest of a split."""
    shapes, traced = ([x.shape for x in some.tensors()] for some in (inputs, program.inputs))
    return program.dynamic or shapes == traced


def _check_options(arguments: argparse.Namespace, reason: str) -> None:
    given = [name for name, default in _BY_STEPS.items() if getattr(arguments, name) != default]
    if given:
        raise ValueError(
            f"{given[0]}: got {getattr(arguments, given[0])!r}, which torch's exporter does not take, and by "
            f"steps the network cannot be written ({reason})"
        )


def _compared(program: ExportedProgram, model: nn.Module, batches: Iterable[Inputs]) -> int:
    """Prints how the first batch differs, layer by layer, and whether everything is explained.

    Returns:
        0 where codes at thresholds and roundings are all that differs, else 1.
    """
    ok, count, examples = True, 0, 0
    for inputs in (part for batch in batches for part in _parts(batch, program.inputs)):
        if not _fits(inputs, program):
            continue
        found = {
            "file and deployed network": explain_file(program, inputs),
            "deployed network and plain float modules": explain_modules(program, model, inputs),
        }
        for title, explanation in found.items():
            if not count or not explanation.ok:
                print(f"{title}, batch {count + 1}\n{explanation.table()}")
            ok = ok and explanation.ok
        count, examples = count + 1, examples + _size(inputs)
    if not count:
        raise ValueError("verify: there are no examples to compare with")
    verdict = "all differences are codes at thresholds and roundings" if ok else "MISMATCH"
    print(f"parity over {examples} examples: {verdict}")
    return 0 if ok else 1
