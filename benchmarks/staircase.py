"""Draws what a checkpoint's quantizers have learned: ``python -m benchmarks.staircase best.ckpt out.png``."""

from __future__ import annotations

import sys

import torch
from matplotlib.figure import Figure

from lightning_n2uq.datamodules import DigitsDataModule
from lightning_n2uq.modules import QuantizedClassifier
from lightning_n2uq.ops import threshold_quantize
from lightning_n2uq.quantizers import LearnableThresholdQuantizer

LAYERS = ("layer1.1.conv1", "layer2.1.conv1", "layer3.1.conv2")


def inputs_of(model: QuantizedClassifier, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """What reaches the named layers' quantizers on the digits' test images."""
    seen: dict[str, torch.Tensor] = {}
    for name in names:
        quantizer = model.backbone.get_submodule(f"{name}.activation_quantizer")
        quantizer.register_forward_pre_hook(
            lambda _, args, name=name: seen.__setitem__(name, args[0].flatten())
        )
    data = DigitsDataModule(batch_size=180)
    data.setup("test")
    with torch.no_grad():
        model(next(iter(data.test_dataloader()))[0])
    return seen


def draw(path: str, output: str) -> None:
    """Staircase over surrogate, input histogram beneath, for three layers."""
    model = QuantizedClassifier.from_checkpoint(path).eval()
    inputs = inputs_of(model, LAYERS)
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(2, len(LAYERS), sharex="col", height_ratios=[3, 1])
    for column, name in enumerate(LAYERS):
        q = model.backbone.get_submodule(f"{name}.activation_quantizer")
        if not isinstance(q, LearnableThresholdQuantizer):
            raise ValueError(f"{name}: its quantizer {q.name!r} has no learned thresholds")
        parameters = [p.detach() for p in (q.start, q.widths, q.scale_in, q.scale_out)]
        x = torch.linspace(-1.0, 3.5, 2000)
        upper, lower = axes[0, column], axes[1, column]
        upper.plot(x, threshold_quantize(x, *parameters, ramp=1.0), color="#d0662a", label="surrogate")
        upper.plot(x, threshold_quantize(x, *parameters), color="#1f5fa8", label="staircase")
        upper.set(title=name, ylabel="output" if column == 0 else "")
        lower.hist(inputs[name].clamp(-1.0, 3.5).numpy(), bins=90, color="#9fb4c8")
        lower.set(xlabel="input", yticks=[])
    axes[0, 0].legend(frameon=False)
    figure.savefig(output, dpi=110)


if __name__ == "__main__":
    draw(*sys.argv[1:3])
