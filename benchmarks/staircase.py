"""Draws what a checkpoint's quantizers have learned: ``python -m benchmarks.staircase best.ckpt out.png``.

Above, the staircase over its surrogate, and dashed the one of evenly spaced thresholds that training began
with; beneath, the thresholds over the inputs of a test batch. Without ``--layers`` the layers are drawn whose
thresholds have moved most, at most one of each stage.
"""

from __future__ import annotations

import argparse

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from lightning_n2uq.datamodules import CIFAR10DataModule, DigitsDataModule
from lightning_n2uq.modules import QuantizedClassifier
from lightning_n2uq.ops import threshold_quantize
from lightning_n2uq.quantizers import LearnableThresholdQuantizer
from lightning_n2uq.quantizers.n2uq import FixedThresholdQuantizer

_SUFFIX = ".activation_quantizer"
_BLUE, _ORANGE, _GREY, _LIGHT = "#1f5fa8", "#d0662a", "#8a8a8a", "#9fb4c8"


def quantizers_of(network: nn.Module) -> dict[str, LearnableThresholdQuantizer]:
    """Quantizers with learned thresholds by the name of their layer.

    Raises:
        ValueError: There is none.
    """
    found = {
        name.removesuffix(_SUFFIX): module
        for name, module in network.named_modules()
        if isinstance(module, LearnableThresholdQuantizer) and not isinstance(module, FixedThresholdQuantizer)
    }
    if not found:
        raise ValueError("checkpoint: got no quantizer with learned thresholds, expected a network of 'n2uq'")
    return found


def evenly_spaced(quantizer: LearnableThresholdQuantizer) -> LearnableThresholdQuantizer:
    """The quantizer as it was before its first step."""
    return LearnableThresholdQuantizer(quantizer.bits)


@torch.no_grad()
def movement(quantizer: LearnableThresholdQuantizer) -> float:
    """The mean distance that thresholds have moved, in units of the distance between two of them at first."""
    first = evenly_spaced(quantizer)
    gap = first.thresholds()[1] - first.thresholds()[0]
    placed = quantizer.thresholds() / quantizer.scale_in  # in units of the input
    return float((placed - first.thresholds()).abs().mean() / gap)


def most_moved(quantizers: dict[str, LearnableThresholdQuantizer], count: int = 3) -> list[str]:
    """Names of the layers whose thresholds have moved most, one of each stage, in the network's order."""
    order = sorted(quantizers, key=lambda name: movement(quantizers[name]), reverse=True)
    by_stage: dict[str, str] = {}
    for name in order:
        by_stage.setdefault(name.split(".")[0], name)
    chosen = list(by_stage.values())[:count]
    return [name for name in quantizers if name in chosen]


@torch.no_grad()
def inputs_of(model: QuantizedClassifier, names: list[str], images: Tensor) -> dict[str, Tensor]:
    """What reaches the named layers' quantizers."""
    seen: dict[str, Tensor] = {}
    handles = [
        model.backbone.get_submodule(name + _SUFFIX).register_forward_pre_hook(
            lambda _, args, name=name: seen.__setitem__(name, args[0].flatten().float())
        )
        for name in names
    ]
    model(images)
    for handle in handles:
        handle.remove()
    return seen


def parameters_of(quantizer: LearnableThresholdQuantizer) -> list[Tensor]:
    """Start, widths and both scales, without gradient."""
    found = (quantizer.start, quantizer.widths, quantizer.scale_in, quantizer.scale_out)
    return [parameter.detach() for parameter in found]


def draw(model: QuantizedClassifier, images: Tensor, names: list[str], output: str) -> None:
    """The picture of the named layers, a column for each."""
    quantizers = quantizers_of(model.backbone)
    unknown = [name for name in names if name not in quantizers]
    if unknown:
        raise ValueError(f"layers: got {unknown[0]!r}, allowed are {', '.join(quantizers)}")
    inputs = inputs_of(model, names, images)
    figure = Figure(figsize=(3.4 * len(names), 4), layout="constrained")
    axes = figure.subplots(2, len(names), sharex="col", squeeze=False, height_ratios=[3, 1.4])
    for column, name in enumerate(names):
        quantizer = quantizers[name]
        with torch.no_grad():
            places = quantizer.thresholds() / quantizer.scale_in
        low, high = -0.6, max(2.2, 1.08 * float(places.max()))
        x = torch.linspace(low, high, 4000)
        upper, lower = axes[0, column], axes[1, column]
        first, learned = parameters_of(evenly_spaced(quantizer)), parameters_of(quantizer)
        upper.plot(x, threshold_quantize(x, *first), color=_GREY, lw=0.9, ls="--", label="at first")
        upper.plot(x, threshold_quantize(x, *learned, ramp=1.0), color=_ORANGE, lw=1.2, label="surrogate")
        upper.plot(x, threshold_quantize(x, *learned), color=_BLUE, lw=1.4, label="staircase")
        upper.set(title=name, ylabel="output" if column == 0 else "")
        shown = inputs[name][(inputs[name] > low) & (inputs[name] < high)]
        lower.hist(shown.numpy(), bins=120, color=_LIGHT)
        for place in places.tolist():
            lower.axvline(place, color=_BLUE, lw=0.8)
        lower.set(xlabel="input", yticks=[], xlim=(low, high), ylabel="inputs" if column == 0 else "")
    axes[0, 0].legend(frameon=False, fontsize=9)
    figure.savefig(output, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    """Reads the arguments and draws."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="of a network with learned thresholds")
    parser.add_argument("output", help="the picture, .png or .svg")
    parser.add_argument("--cifar", help="folder or .zip of CIFAR-10 images; without it the digits")
    parser.add_argument("--layers", nargs="+", default=[], help="names of layers in the backbone")
    options = parser.parse_args(arguments)
    model = QuantizedClassifier.from_checkpoint(options.checkpoint, "checkpoint").eval()
    data = (
        CIFAR10DataModule(root=options.cifar, batch_size=250)
        if options.cifar
        else DigitsDataModule(batch_size=180)
    )
    data.setup("test")
    images, _ = next(iter(data.test_dataloader()))
    draw(model, images, options.layers or most_moved(quantizers_of(model.backbone)), options.output)


if __name__ == "__main__":
    main()
