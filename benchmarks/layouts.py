"""Fused operators and training steps: channels-last maps in fp32 and bf16 against contiguous fp32 ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.timing import summary, table, take_turns
from lightning_n2uq.backbones import resnet18
from lightning_n2uq.ops.dispatch import load
from lightning_n2uq.ops.formats.fused_activation import NormParameters, PReLUParameters, Window
from lightning_n2uq.ops.tables import QuantizerParameters

BASE = "contiguous, fp32"
MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    BASE: lambda x: x,
    "channels-last, fp32": lambda x: x.contiguous(memory_format=torch.channels_last),
    "channels-last, bf16": lambda x: x.bfloat16().contiguous(memory_format=torch.channels_last),
}
Calls = dict[str, Callable[[], object]]


def _quantizer(bits: int) -> QuantizerParameters:
    n = 2**bits - 1
    return QuantizerParameters(torch.zeros(1), torch.full((n,), 2 / n), torch.ones(1), torch.ones(1))


def _activation(x: Tensor, grad: Tensor, bits: int) -> Calls:
    kernels, quantizer = load("packed_activation", x.device), _quantizer(bits)
    norm, act = NormParameters(*torch.rand(2, x.shape[1]), 1e-5), PReLUParameters(*torch.rand(3, x.shape[1]))
    _, packed, stats = kernels.forward(x, norm, act, quantizer, x.dtype)
    kept = kernels.codes_for_backward(packed)
    return {
        f"activation, {bits} bits, forward": lambda: kernels.forward(x, norm, act, quantizer, x.dtype),
        f"activation, {bits} bits, backward": lambda: kernels.backward(
            grad, x, kept, stats, norm, act, quantizer
        ),
        f"rebuild, {bits} bits": lambda: kernels.rebuild(packed, quantizer.scale_out, bits, x.shape, x.dtype),
    }


def _residual(x: Tensor, grad: Tensor) -> Calls:
    kernels = load("residual_block", x.device)
    norm, act = NormParameters(*torch.rand(2, x.shape[1]), 1e-5), PReLUParameters(*torch.rand(3, x.shape[1]))
    _, stats, other = kernels.forward(x, norm, grad, None, act)
    return {
        "residual end, forward": lambda: kernels.forward(x, norm, grad, None, act),
        "residual end, backward": lambda: kernels.backward(grad, x, stats, norm, grad, other, None, act),
    }


def _stem(x: Tensor, grad: Tensor) -> Calls:
    kernels, window = load("stem", x.device), Window(3, 2, 1)
    norm = NormParameters(*torch.rand(2, x.shape[1]), 1e-5)
    _, taps, stats = kernels.forward(x, norm, window)
    return {
        "stem, forward": lambda: kernels.forward(x, norm, window),
        "stem, backward": lambda: kernels.backward(grad, taps, x, stats, norm, window),
    }


def _operators(batch: int, size: int) -> list[tuple[str, dict[str, Calls]]]:
    """Title and operators, by layout, of a ResNet-18's maps; `size` is that of the image."""
    cases = []
    for stage in range(4):
        shape = (batch, 64 << stage, size >> (2 + stage), size >> (2 + stage))
        x, grad = torch.randn(shape), torch.randn(shape)
        calls = {
            name: _activation(put(x), put(grad), 2)
            | _activation(put(x), put(grad), 4)
            | _residual(put(x), put(grad))
            for name, put in MAPS.items()
        }
        cases.append(("x".join(map(str, shape)), calls))
    x, grad = torch.randn(batch, 64, size // 2, size // 2), torch.randn(batch, 64, size // 4, size // 4)
    cases.append(
        ("x".join(map(str, x.shape)), {name: _stem(put(x), put(grad)) for name, put in MAPS.items()})
    )
    return cases


def _step(x: Tensor, target: Tensor, order: torch.memory_format) -> Callable[[], object]:
    model, x = resnet18(4, 4).to(memory_format=order).train(), x.contiguous(memory_format=order)

    def run() -> object:
        model.zero_grad()
        loss = nn.functional.cross_entropy(model(x), target)
        loss.backward()
        return loss

    return run


def run(device: torch.device, seconds: float, batch: int = 8, size: int = 224) -> dict[str, object]:
    """Every operator of a ResNet-18 in every layout, then its step in single precision; prints tables."""
    if device.type != "cpu":
        raise ValueError(
            f"device: got {device.type}, allowed is cpu (maps on a GPU are always channels-last)"
        )
    results: dict[str, object] = {}
    for title, layouts in _operators(batch, size):
        for name in layouts[BASE]:
            calls = {layout: operators[name] for layout, operators in layouts.items()}
            times = summary(take_turns(calls, seconds / 20, device), BASE)
            print(table(f"{name}, {title}", times))
            results[f"{name}, {title}"] = times
    x, target = torch.randn(batch, 3, size, size), torch.randint(1000, (batch,))
    steps = {
        BASE: _step(x, target, torch.contiguous_format),
        "channels-last, fp32": _step(x, target, torch.channels_last),
    }
    times = summary(take_turns(steps, seconds, device), BASE)
    print(table(f"ResNet-18 W4A4, forward and backward, {batch} x {size}x{size}, fp32", times))
    return {"batch": batch, "size": size, "operators": results, "step": times}
