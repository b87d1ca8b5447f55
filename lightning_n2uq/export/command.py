"""`n2uq export`: writes a checkpoint's network as an integer network, and proves that it is the same."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_n2uq.utils.class_names import KEY
from lightning_n2uq.utils.extras import how_to_install
from lightning_n2uq.utils.preprocessing import KEY as PREPROCESSING
from lightning_n2uq.utils.preprocessing import preprocessing_from

if TYPE_CHECKING:
    from torch import nn

    from lightning_n2uq.export.ir.description import Description

PACKAGES: dict[str, set[str]] = {
    "onnx": {"onnx"},
    "qonnx": {"onnx"},
    "safetensors": {"safetensors"},
    "pt2": set(),
}
"""Formats, with the packages that each needs."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Returns:
        0 when the file is written (and parity holds), 1 on a mismatch.

    Raises:
        ValueError: The user made a mistake; one line that names the argument.
    """
    arguments = parser().parse_args(argv)
    _check(arguments)
    from lightning_n2uq.cli.own_code import see_current_folder
    from lightning_n2uq.export.ir.sizes import size_report
    from lightning_n2uq.export.lower.checkpoint import is_foreign, load_network
    from lightning_n2uq.export.lower.preprocessing import with_normalization

    see_current_folder()  # where a backbone of the user's own may lie
    if is_foreign(arguments.ckpt):
        from lightning_n2uq.export.program import command

        return command.run_module(arguments)
    model, shape, metadata = load_network(arguments.ckpt)
    description = _description(model, shape, metadata, arguments)
    if isinstance(description, str):
        from lightning_n2uq.export.program import command

        return command.run(model, shape, metadata, arguments, description)
    _pixels(arguments, metadata)
    if arguments.mean is not None:
        description = with_normalization(description, arguments.mean, arguments.std, arguments.pixel_scale)
    print(description.summary())
    output = Path(arguments.output)
    _write(description, output, arguments)
    print(f"wrote {output}\n{size_report(description, output.stat().st_size)}")
    print(_interface(description))
    return 0 if arguments.verify is None or _verify(description, model, output, arguments) else 1


def _pixels(arguments: argparse.Namespace, metadata: dict[str, str]) -> None:
    """With `--pixels`, takes mean, deviation and scale from the run."""
    if not arguments.pixels:
        return
    if PREPROCESSING not in metadata:
        raise ValueError(
            f"pixels: {arguments.ckpt!r} holds no preprocessing, give --mean, --std and --pixel-scale instead"
        )
    steps = preprocessing_from(json.loads(metadata[PREPROCESSING]), "ckpt")
    arguments.mean, arguments.std, arguments.pixel_scale = steps.mean, steps.std, steps.pixel_scale


def _interface(description: Description) -> str:
    """Returns what goes in and out, in words."""
    first, classes = description.input, json.loads(description.metadata.get(KEY, "null"))
    lines = [f"input {first.name}: {first.dtype} [N, {', '.join(map(str, first.shape))}]"]
    if PREPROCESSING in description.metadata:
        steps = preprocessing_from(json.loads(description.metadata[PREPROCESSING]), "ckpt")
        inside = " (the last inside the network)" if first.dtype == "uint8" else ""
        lines.append(f"prepared by: {steps}{inside}")
    from lightning_n2uq.export.ir.description import with_output_named

    names = f": {', '.join(classes[:8])}{', ...' if len(classes) > 8 else ''}" if classes else ""
    return "\n".join([*lines, f"output {with_output_named(description).output}{names}"])


def _description(
    model: nn.Module, shape: tuple[int, int, int], metadata: dict[str, str], arguments: argparse.Namespace
) -> Description | str:
    """Returns the network by steps, or why torch's exporter is to write it."""
    from lightning_n2uq.export.lower.trace import describe

    if arguments.exporter == "torch":
        return "as asked"
    try:
        return describe(model, shape, metadata)
    except ValueError as error:
        if arguments.exporter == "steps" or arguments.format != "onnx":
            raise
        return str(error)


def parser() -> argparse.ArgumentParser:
    """Returns the command's options."""
    p = argparse.ArgumentParser(prog="n2uq export", description=__doc__.partition("\n")[0])
    p.add_argument(
        "--ckpt", "--ckpt_path", required=True, metavar="FILE", help="checkpoint of a trained network"
    )
    p.add_argument("--format", choices=list(PACKAGES), default="onnx")
    p.add_argument(
        "--exporter",
        choices=["auto", "steps", "torch"],
        default="auto",
        help="onnx: exact steps, torch's exporter for any network, or (auto) the first that can",
    )
    p.add_argument("-o", "--output", required=True, help="file to write")
    p.add_argument("--verify", metavar="DATA", help="compare all engines on this data (docs/deployment.md)")
    p.add_argument(
        "--verify-root", metavar="PATH", help="folder or .zip that replaces the config's data root"
    )
    p.add_argument("--verify-images", type=_positive, help="use at most so many images")
    p.add_argument("--sweep", type=_positive, metavar="N", help="with --verify: also N values per quantizer")
    p.add_argument(
        "--engines",
        help="engines of --verify (default: torch,fast,numpy,onnxruntime,qonnx, and pt2 for its files)",
    )
    p.add_argument(
        "--pixels",
        action="store_true",
        help="take uint8 pixels and normalize inside, by the run's own mean and deviation",
    )
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


def _check(arguments: argparse.Namespace) -> None:
    """Refuses what would fail after the network has been read."""
    needed = PACKAGES[arguments.format] | (set() if arguments.verify is None else {"onnx", "onnxruntime"})
    if arguments.format == "pt2":
        from lightning_n2uq.export.formats.pt2_file import check_name, compiler

        check_name(arguments.output)
        compiler()
    missing = sorted(package for package in needed if find_spec(package) is None)
    if missing:
        raise ValueError(f"format: {', '.join(missing)} missing; {how_to_install('export')}")
    if arguments.verify is None and arguments.verify_root is not None:
        raise ValueError(f"verify_root: got {arguments.verify_root!r} without verify, give both or neither")
    if arguments.exporter == "torch" and arguments.format != "onnx":
        raise ValueError(f"exporter: got 'torch' with format {arguments.format!r}, allowed is onnx")
    if arguments.pixels and arguments.mean is not None:
        raise ValueError("pixels: given together with mean, allowed is one of them")
    if (arguments.mean is None) != (arguments.std is None):
        raise ValueError("mean, std: one without the other, give both or neither")


def _write(description: Description, output: Path, arguments: argparse.Namespace) -> None:
    if arguments.format == "onnx":
        from lightning_n2uq.export.formats.onnx_file import save_onnx

        save_onnx(description, output, arguments.convolution, arguments.opset)
    elif arguments.format == "qonnx":
        from lightning_n2uq.export.formats.qonnx_file import save_qonnx

        save_qonnx(description, output, arguments.batch)
    elif arguments.format == "pt2":
        from lightning_n2uq.export.formats.pt2_file import save_pt2

        save_pt2(description, output)
    else:
        from lightning_n2uq.export.formats.safetensors_file import save_safetensors

        save_safetensors(description, output)


def _verify(description: Description, model: nn.Module, output: Path, arguments: argparse.Namespace) -> bool:
    from lightning_n2uq.export.lower.preprocessing import normalization
    from lightning_n2uq.export.runtime.engines import chosen_engines
    from lightning_n2uq.export.verify.data import run_data, to_pixels, verification_batches
    from lightning_n2uq.export.verify.parity import compare, evaluation_engine, float_engine

    subject: Description = description
    file: bytes | Path | None = None
    if arguments.format == "safetensors":
        from lightning_n2uq.export.formats.safetensors_file import load_safetensors

        subject = load_safetensors(output)
    else:
        file = output if arguments.format == "pt2" else output.read_bytes()
    names = _engine_names(subject, arguments)
    engines = chosen_engines(names, subject, file, arguments.format)
    source, root = run_data(arguments.verify, arguments.verify_root, arguments.ckpt)
    classes = json.loads(description.metadata.get(KEY, "null"))
    batches = verification_batches(
        source, description.input.shape, arguments.verify_images, root=root, classes=classes
    )
    normalize = None
    if arguments.mean is not None:
        normalize = normalization("images", (), arguments.mean, arguments.std, arguments.pixel_scale)
        batches = to_pixels(batches, normalize)
    if evaluation := evaluation_engine(model, normalize):
        engines["evaluation"] = evaluation
    report = compare(engines, batches, float_engine(model, normalize))
    print(report.table())
    return _sweep(subject, names, arguments) and report.ok


def _engine_names(description: Description, arguments: argparse.Namespace) -> list[str]:
    """Returns the engines asked for, less those that cannot run here, which are named."""
    usual = ["torch", "fast", "numpy", "onnxruntime", "qonnx"] + ["pt2"] * (arguments.format == "pt2")
    names: list[str] = usual if arguments.engines is None else arguments.engines.split(",")
    wide = "sums pass 2^24" if description.wide_layers() else ""
    reason = wide or ("not installed" if find_spec("qonnx") is None else "")
    if "qonnx" in names and reason:
        print(f"qonnx: left out of the comparison ({reason})")
        names.remove("qonnx")
    return names


def _sweep(description: Description, names: list[str], arguments: argparse.Namespace) -> bool:
    if not arguments.sweep:
        return True
    from lightning_n2uq.export.verify.sweep import SWEPT, sweep

    left_out = [name for name in names if name not in SWEPT]
    if left_out:
        print(f"{left_out[0]}: left out of the sweep (every quantizer would be compiled alone)")
    names = [name for name in names if name in SWEPT]
    wrong = 0
    for step in description.quantizers():
        counts = sweep(step, arguments.sweep, names)
        values = counts.pop("values")
        wrong += sum(counts.values())
        print(f"{step.name}: {values} values, " + ", ".join(f"{k} {v}" for k, v in counts.items()))
    print(f"sweep: {'all engines agree' if not wrong else f'{wrong} codes differ'}")
    return not wrong
