"""Methods for activations without a ReLU in front, on a small vision transformer trained on the digits.

    python -m benchmarks.signed_inputs --output benchmarks/results/signed_inputs.json

A float network (8 x 8 images, patches of 2, depth 4, width 64, 4 heads) is trained first. Every variant
starts from it, with the inputs of all inner layers and the operands of attention's products on the same few
bits, and weights by LSQ. Variants `from zero` have levels from 0 up and no offset. Accuracies are those of
360 test images after the last epoch, mean and standard deviation over seeds.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from benchmarks.machine import description
from benchmarks.networks.catalog import small_vit
from lightning_n2uq.convert import calibrate, quantize_model
from lightning_n2uq.convert.ranged_input import RangedInput
from lightning_n2uq.quantizers import quantizer_parameters

VARIANTS = {
    "n2uq, offset": ("n2uq", False),
    "n2uq, from zero": ("n2uq", True),
    "lsq, offset": ("lsq", False),
    "lsq, from zero": ("lsq", True),
    "lsq_plus": ("lsq_plus", False),
    "lsq_signed": ("lsq_signed", False),
}
"""Methods, and whether the offset is taken away."""

_BATCH = 64


def main() -> None:
    """Trains all variants, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--float_epochs", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=12, help="of each variant; 0 only fits its ranges")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--output", type=Path, help="a JSON file for the accuracy of every run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[tuple[str, int], list[float]] = {(name, b): [] for name in VARIANTS for b in options.bits}
    floats = []
    for seed in range(options.seeds):
        data = _data(seed)
        base = _network(seed)
        floats.append(_train(base, data, options.float_epochs, 2e-3, seed))
        for name, (method, from_zero) in VARIANTS.items():
            for bits in options.bits:
                model = _quantized(copy.deepcopy(base), data[0][0], method, bits, from_zero)
                found[name, bits].append(_train(model, data, options.epochs, 1e-3, seed))
                print(f"seed {seed}, {name}, {bits} bits: {found[name, bits][-1]:.2f} %", flush=True)
    machine = description(torch.device("cpu"))
    if options.output is not None:
        _write(options, machine, floats, found)
    print(f"\n{machine['processor']}, one thread; float: {_shown(floats)}\n")
    print(f"| inputs and products | {' | '.join(f'W{b}A{b}' for b in options.bits)} |")
    print(f"|---|{'---|' * len(options.bits)}")
    for name in VARIANTS:
        print(f"| {name} | {' | '.join(_shown(found[name, bits]) for bits in options.bits)} |")


def _write(
    options: argparse.Namespace,
    machine: dict[str, Any],
    floats: list[float],
    found: dict[tuple[str, int], list[float]],
) -> None:
    """Writes the accuracies of all seeds, and what they were made with."""
    chosen = {name: value for name, value in vars(options).items() if name != "output"}
    rows = [{"variant": name, "bits": bits, "accuracies": row} for (name, bits), row in found.items()]
    content = {"machine": machine, "options": chosen, "float": floats, "rows": rows}
    options.output.write_text(json.dumps(content, indent=1) + "\n")


def _shown(values: list[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.1f} ± {spread:.1f} %"


def _network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return small_vit(8, 2, depth=4, heads=4)


Data = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


def _data(seed: int) -> Data:
    x, y = load_digits(return_X_y=True)
    parts = train_test_split(x / 8 - 1, y, test_size=360, stratify=y, random_state=seed)
    x, x_test, y, y_test = (torch.from_numpy(part) for part in parts)
    return (_images(x), y.long()), (_images(x_test), y_test.long())


def _images(x: Tensor) -> Tensor:
    return x.float().reshape(-1, 1, 8, 8).expand(-1, 3, -1, -1)


def _quantized(model: nn.Module, images: Tensor, method: str, bits: int, from_zero: bool) -> nn.Module:
    policy = {
        "weight_bits": bits,
        "activation_bits": bits,
        "attention_bits": bits,
        "weight_quantizer": "lsq",
        "activation_quantizer": method,
    }
    quantize_model(model, policy, example=images[:2])
    if from_zero:
        for quantizer in [m for m in model.modules() if isinstance(m, RangedInput)]:
            quantizer.offset = None
            quantizer.range_of = _from_zero(quantizer.range_of)
    calibrate(model, [images[:256]])
    return model


def _from_zero(
    range_of: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    return lambda sample: range_of(sample.clamp_min(0))


def _batches(data: tuple[Tensor, Tensor], generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    x, y = data
    for rows in torch.randperm(len(x), generator=generator).split(_BATCH):
        shift = torch.randint(-1, 2, (2,), generator=generator).tolist()
        yield torch.roll(x[rows], shift, (2, 3)), y[rows]


def _train(model: nn.Module, data: Data, epochs: int, lr: float, seed: int) -> float:
    """Trains, and returns the accuracy on the test images in percent."""
    slow = {id(parameter) for _, parameter in quantizer_parameters(model)}
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in slow], "lr": lr, "weight_decay": 0.05},
        {"params": [p for p in model.parameters() if id(p) in slow], "lr": lr / 10, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]])
    steps = epochs * -(-len(data[0][0]) // _BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        for x, y in _batches(data[0], generator):
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    model.eval()
    with torch.no_grad():
        return 100 * float((model(data[1][0]).argmax(1) == data[1][1]).float().mean())


if __name__ == "__main__":
    main()
