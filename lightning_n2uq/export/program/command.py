"""`n2uq export` for networks that have no form by steps: torch's exporter writes, and parity is explained."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_n2uq.export.program.explain import explain_file, explain_modules
from lightning_n2uq.export.program.onnx_program import ExportedProgram, Inputs, export_program
from lightning_n2uq.export.verify.data import run_data, verification_batches
from lightning_n2uq.utils.class_names import KEY

_BY_STEPS = {
    "mean": None,
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
    given = [name for name, default in _BY_STEPS.items() if getattr(arguments, name) != default]
    if given:
        raise ValueError(
            f"{given[0]}: got {getattr(arguments, given[0])!r}, which torch's exporter does not take, and by "
            f"steps the network cannot be written ({reason})"
        )
    network = getattr(model, "backbone", model)
    program = export_program(network, torch.zeros(2, *shape), metadata=metadata)
    print(f"by torch's exporter: {reason}\n{program.deployed.summary()}")
    program.save(arguments.output)
    batch = "any" if program.dynamic else "2 only, as the network fixes it"
    print(f"wrote {arguments.output}: {Path(arguments.output).stat().st_size:,} bytes, batch size {batch}")
    return 0 if arguments.verify is None or _verify(program, network, shape, metadata, arguments) else 1


def _verify(
    program: ExportedProgram,
    model: nn.Module,
    shape: tuple[int, int, int],
    metadata: dict[str, str],
    arguments: argparse.Namespace,
) -> bool:
    source, root = run_data(arguments.verify, arguments.verify_root, arguments.ckpt)
    classes, size = json.loads(metadata.get(KEY, "null")), 64 if program.dynamic else 2
    batches = verification_batches(source, shape, arguments.verify_images, size, root, classes)
    return _compared(program, model, (torch.from_numpy(images) for images, _ in batches))


def _compared(program: ExportedProgram, model: nn.Module, batches: Iterable[Tensor]) -> bool:
    """Prints how the first batch differs, layer by layer, and how many batches are explained."""
    ok, count, examples = True, 0, 0
    for images in batches:
        if not program.dynamic and len(images) != 2:
            continue  # the rest of a split that the fixed batch does not divide
        found = {
            "file and deployed network": explain_file(program, Inputs((images,))),
            "deployed network and plain float modules": explain_modules(program, model, Inputs((images,))),
        }
        for title, explanation in found.items():
            if not count or not explanation.ok:
                print(f"{title}, batch {count + 1}\n{explanation.table()}")
            ok = ok and explanation.ok
        count, examples = count + 1, examples + len(images)
    if not count:
        raise ValueError("verify: there are no images to compare with")
    verdict = "all differences are codes at thresholds and roundings" if ok else "MISMATCH"
    print(f"parity over {examples} images: {verdict}")
    return ok
