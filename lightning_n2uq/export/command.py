"""`n2uq export`: writes a checkpoint's network as an integer network, and proves that it is the same."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from lightning_n2uq.export.ir.description import Description

FORMATS = {"onnx": "onnx", "qonnx": "qonnx", "safetensors": "safetensors"}
"""Formats, with the package that each needs."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Returns:
        0 when the file is written (and parity holds), 1 on a mismatch.

    Raises:
        ValueError: a mistake of the user's, as one line that names the argument.
    """
    arguments = parser().parse_args(argv)
    _check_packages(arguments.format, arguments.verify is not None)
    if arguments.verify is None and arguments.verify_root is not None:
        raise ValueError(f"verify_root: got {arguments.verify_root!r} without verify, give both or neither")
    from lightning_n2uq.export.lower.checkpoint import load_network
    from lightning_n2uq.export.lower.trace import describe

    model, shape, metadata = load_network(arguments.ckpt)
    plain = describe(model, shape, metadata)
    description = _with_preprocessing(plain, arguments)
    print(description.summary())
    output = Path(arguments.output)
    _write(description, output, arguments)
    from lightning_n2uq.export.ir.sizes import size_report

    print(f"wrote {output}\n{size_report(description, output.stat().st_size)}")
    if arguments.verify is None:
        return 0
    return 0 if _verify(description, plain, model, output, arguments) else 1


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    p = argparse.ArgumentParser(prog="n2uq export", description=__doc__.partition("\n")[0])
    p.add_argument("--ckpt", required=True, help="checkpoint of a trained network")
    p.add_argument("--format", choices=list(FORMATS), default="onnx")
    p.add_argument("-o", "--output", required=True, help="file to write")
    p.add_argument("--verify", metavar="DATA", help="compare all engines on this data (docs/deployment.md)")
    p.add_argument(
        "--verify-root", metavar="PATH", help="folder or .zip that replaces the config's data root"
    )
    p.add_argument("--verify-images", type=_positive, help="use at most so many images")
    p.add_argument("--sweep", type=_positive, metavar="N", help="with --verify: also N values per quantizer")
    p.add_argument("--engines", default="torch,numpy,onnxruntime,qonnx", help="engines of --verify")
    p.add_argument("--mean", type=_numbers, help="take uint8 pixels and normalize inside: mean by channel")
    p.add_argument("--std", type=_numbers, help="likewise: standard deviation by channel")
    p.add_argument("--pixel-scale", type=float, default=255.0, help="pixel value that stands for 1")
    p.add_argument("--convolution", choices=["matmul", "conv"], default="matmul", help="onnx: see the docs")
    p.add_argument(
        "--opset",
        type=int,
        choices=[21, 25],
        help="onnx: 21 has no 2-bit type (default: 25, if the installed onnx and onnxruntime know it)",
    )
    p.add_argument("--batch", type=_positive, help="qonnx: fixed batch size (FINN wants one)")
    return p


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, allowed is a positive integer")
    return int(text)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"got {text!r}, allowed are numbers with commas between") from error


def _check_packages(name: str, verify: bool) -> None:
    from importlib.util import find_spec

    needed = {"onnx", "onnxruntime"} if verify else set()
    if name in ("onnx", "qonnx"):
        needed.add("onnx")
    if name == "safetensors":
        needed.add("safetensors")
    missing = sorted(package for package in needed if find_spec(package) is None)
    if missing:
        raise ValueError(f"format: {', '.join(missing)} missing; pip install 'lightning_n2uq[export]'")


def _with_preprocessing(description: Description, arguments: argparse.Namespace) -> Description:
    if arguments.mean is None and arguments.std is None:
        return description
    if arguments.mean is None or arguments.std is None:
        raise ValueError("mean, std: one without the other, give both or neither")
    from lightning_n2uq.export.lower.preprocessing import with_normalization

    return with_normalization(description, arguments.mean, arguments.std, arguments.pixel_scale)


def _write(description: Description, output: Path, arguments: argparse.Namespace) -> None:
    """Writes beside the target first, so that a failure leaves no half file under its name."""
    output.parent.mkdir(parents=True, exist_ok=True)
    draft = output.with_name(output.name + ".part")
    try:
        if arguments.format == "onnx":
            from lightning_n2uq.export.formats.onnx_file import save_onnx

            save_onnx(description, draft, arguments.convolution, arguments.opset)
        elif arguments.format == "qonnx":
            from lightning_n2uq.export.formats.qonnx_file import save_qonnx

            save_qonnx(description, draft, arguments.batch)
        else:
            from lightning_n2uq.export.formats.safetensors_file import save_safetensors

            save_safetensors(description, draft)
        os.replace(draft, output)
    finally:
        draft.unlink(missing_ok=True)


def _verify(
    description: Description,
    plain: Description,
    model: nn.Module,
    output: Path,
    arguments: argparse.Namespace,
) -> bool:
    from lightning_n2uq.export.lower.preprocessing import normalizer, to_pixels
    from lightning_n2uq.export.runtime.engines import chosen_engines
    from lightning_n2uq.export.verify.data import run_data, verification_batches
    from lightning_n2uq.export.verify.parity import compare, float_engine

    subject, file = description, None
    if arguments.format == "safetensors":
        from lightning_n2uq.export.formats.safetensors_file import load_safetensors

        subject = load_safetensors(output)
    else:
        file = output.read_bytes()
    names = _engine_names(subject, arguments)
    engines = chosen_engines(names, subject, file, arguments.format)
    source, root = run_data(arguments.verify, arguments.verify_root, arguments.ckpt)
    batches = verification_batches(source, plain.input.shape, arguments.verify_images, root=root)
    prepare = None
    if description is not plain:
        batches, prepare = to_pixels(batches, description), normalizer(description)
    report = compare(engines, batches, float_engine(model, prepare))
    print(report.table())
    return _sweep(subject, names, arguments) and report.ok


def _engine_names(description: Description, arguments: argparse.Namespace) -> list[str]:
    """The engines asked for, less those that cannot run here, which are named."""
    from importlib.util import find_spec

    from lightning_n2uq.export.ir.description import needs_float64
    from lightning_n2uq.export.ir.steps import IntConv

    names: list[str] = arguments.engines.split(",")
    wide = any(isinstance(step, IntConv) and needs_float64(step) for step in description.steps)
    reason = "sums pass 2^24" if wide else "not installed" if find_spec("qonnx") is None else ""
    if "qonnx" in names and reason:
        print(f"qonnx: left out of the comparison ({reason})")
        names.remove("qonnx")
    return names


def _sweep(description: Description, names: list[str], arguments: argparse.Namespace) -> bool:
    if not arguments.sweep:
        return True
    from lightning_n2uq.export.verify.sweep import sweep

    wrong = 0
    for step in description.quantizers():
        counts = sweep(step, arguments.sweep, names)
        values = counts.pop("values")
        wrong += sum(counts.values())
        print(f"{step.name}: {values} values, " + ", ".join(f"{k} {v}" for k, v in counts.items()))
    print(f"sweep: {'all engines agree' if not wrong else f'{wrong} codes differ'}")
    return not wrong
