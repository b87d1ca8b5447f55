"""`n2uq convert IN OUT`: the published checkpoint format to ours, and back."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_n2uq import backbones
from lightning_n2uq.interop.official import (
    load_official_checkpoint,
    read_state_dict,
    save_official_checkpoint,
)
from lightning_n2uq.utils.atomic import replacing

_OURS = {"state_dict", "hyper_parameters"}


def main(argv: Sequence[str]) -> int:
    """Reads IN, finds out which format it has, and writes OUT in the other one."""
    arguments = _parser().parse_args(list(argv))
    if not Path(arguments.source).is_file():
        raise ValueError(f"IN: no such file {arguments.source!r}")
    if os.path.exists(arguments.target) and not arguments.overwrite:
        raise ValueError(f"OUT: {arguments.target!r} exists already; --overwrite replaces it")
    try:
        content = torch.load(arguments.source, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling a damaged file raises almost anything
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"IN: cannot read {arguments.source!r} ({reason})") from error
    if isinstance(content, Mapping) and content.keys() >= _OURS:
        _export(arguments.source, arguments.target)
    else:
        _import(content, arguments)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "n2uq convert",
        description="Published N2UQ checkpoint to one of ours (for n2uq test --ckpt_path, init_from, "
        "teacher), or one of ours to the published format.",
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="IN", help="checkpoint to read; its format is found out")
    parser.add_argument("target", metavar="OUT", help="checkpoint to write")
    parser.add_argument("--arch", choices=backbones.names(), help="network of a published checkpoint")
    parser.add_argument("--bits", type=int, help="bits of a published checkpoint, 2 to 8")
    parser.add_argument("--quantize-downsample", action="store_true", help="its shortcuts are quantized")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    return parser


def _import(content: Any, arguments: argparse.Namespace) -> None:  # noqa: ANN401 -- whatever the file held
    from lightning_n2uq.modules import QuantizedClassifier

    for option in ("arch", "bits"):
        if getattr(arguments, option) is None:
            raise ValueError(f"--{option}: is needed to read {arguments.source!r}, a published checkpoint")
    state = read_state_dict(content)
    if "fc.weight" not in state:
        raise ValueError("IN: has no entry 'fc.weight', so it is no published checkpoint")
    model = QuantizedClassifier(
        backbone=arguments.arch,
        weight_bits=arguments.bits,
        activation_bits=arguments.bits,
        quantize_downsample=arguments.quantize_downsample,
        num_classes=len(state["fc.weight"]),
        in_channels=_image_channels(state),
        image_size=224,
    )
    report = load_official_checkpoint(state, model.backbone)
    _save(model, arguments.target)
    print(f"{arguments.source} -> {arguments.target}: {report.summary().partition(': ')[2]}")


def _image_channels(state: Mapping[str, torch.Tensor]) -> int:
    stem = next((state[key] for key in ("conv1.weight", "feature.0.conv1.weight") if key in state), None)
    return 3 if stem is None else stem.shape[1]


def _export(source: str, target: str) -> None:
    from lightning_n2uq.modules import QuantizedClassifier

    model = QuantizedClassifier.from_checkpoint(source, "IN")
    save_official_checkpoint(model.backbone, target)
    print(f"{source} -> {target}: published format, {len(model.backbone.state_dict())} entries")


def _save(model: nn.Module, path: str) -> None:
    """Writes what Lightning reads for evaluation and as a starting point, without a training state."""
    import lightning

    checkpoint = {
        "pytorch-lightning_version": lightning.__version__,
        "epoch": 0,
        "global_step": 0,
        "state_dict": model.state_dict(),
        "hparams_name": "kwargs",
        "hyper_parameters": dict(model.hparams),  # type: ignore[arg-type]
    }
    with replacing(path) as partial:
        torch.save(checkpoint, partial)
