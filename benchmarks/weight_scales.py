"""What the scale of quantized weights costs: ``python -m benchmarks.weight_scales CHECKPOINT IMAGES.zip``.

The weights of a trained float network are quantized, its activations are not, and its batch norms take their
statistics anew from training images: what is lost is lost by the levels alone. Beside the accuracy stands the
squared error of the same quantizer on normally distributed weights, relative to their variance.

- `n2uq`: the entropy-preserving scale, `mean |W|` times `n / 2^(b - 1)`, `n = 2^b - 1` (N2UQ, section 3).
- `lsq`: the first value of the learned step, `2 mean |W| / sqrt(2^(b - 1) - 1)` (LSQ, section 2.1).
- `least_error`: N2UQ's levels scaled for the least squared error on normally distributed weights (Max 1960).
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from lightning_n2uq.datamodules import CIFAR10DataModule
from lightning_n2uq.modules import QuantizedClassifier
from lightning_n2uq.quantizers import weight_quantizer

Batches = list[tuple[Tensor, Tensor]]


def by_method(name: str, bits: int) -> Callable[[Tensor], Tensor]:
    """Quantizes `[C, ...]` by a method's first values."""
    return lambda weight: weight_quantizer(name, bits).train()(weight).detach()


def choices(bits: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """The quantizers that are compared, by name."""
    return {name: by_method(name, bits) for name in ("n2uq", "lsq", "least_error")}


def relative_error(quantize: Callable[[Tensor], Tensor], count: int = 1_000_000) -> float:
    """Squared error over variance on normally distributed weights."""
    weight = torch.randn(1, count, generator=torch.Generator().manual_seed(0))
    return float((weight - quantize(weight)).square().mean())


@torch.no_grad()
def accuracy(model: QuantizedClassifier, norms: Batches, test: Batches) -> float:
    """Test accuracy in percent after batch norms have taken their statistics from `norms`."""
    for module in model.eval().modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train().reset_running_stats()
            module.momentum = None
    for images, _ in norms:
        model(images)
    model.eval()
    hits = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in test)
    return 100 * hits / sum(len(labels) for _, labels in test)


def with_weights(model: QuantizedClassifier, quantize: Callable[[Tensor], Tensor]) -> QuantizedClassifier:
    """A copy whose convolutions, but for the first, have quantized weights."""
    twin = copy.deepcopy(model)
    _, *others = (module for module in twin.backbone.modules() if isinstance(module, nn.Conv2d))
    for module in others:
        module.weight.data = quantize(module.weight.data)
    return twin


def table(model: QuantizedClassifier, norms: Batches, test: Batches, widths: Iterable[int]) -> str:
    """A Markdown table, a row per width and scale."""
    lines = [
        f"| bits | scale | squared error, normal weights | test accuracy [%], float "
        f"{accuracy(copy.deepcopy(model), norms, test):.2f} |",
        "|---|---|---|---|",
    ]
    for bits in widths:
        for name, quantize in choices(bits).items():
            quantized = accuracy(with_weights(model, quantize), norms, test)
            lines.append(f"| {bits} | {name} | {relative_error(quantize):.4f} | {quantized:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="of a float network")
    parser.add_argument("root", help="folder or .zip, as CIFAR10DataModule takes it")
    parser.add_argument("--images", type=int, default=4000, help="test images, and training images for norms")
    options = parser.parse_args()
    data = CIFAR10DataModule(root=options.root, batch_size=250, augment=False)
    data.setup()
    data.setup("test")
    train = [batch for batch, _ in zip(data.train_dataloader(), range(options.images // 250), strict=False)]
    images, labels = (torch.cat(parts) for parts in zip(*data.test_dataloader(), strict=True))
    chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[: options.images]
    test = list(zip(images[chosen].split(250), labels[chosen].split(250), strict=True))
    model = QuantizedClassifier.from_checkpoint(options.checkpoint, "checkpoint")
    print(table(model, train, test, (2, 3, 4)))


if __name__ == "__main__":
    main()
