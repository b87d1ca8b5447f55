"""A ResNet-18 training step against torchvision's float network: time, and memory kept for backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torchvision
from torch import Tensor, nn

from benchmarks.timing import summary, table, take_turns
from lightning_n2uq.backbones import resnet18
from lightning_n2uq.convert import quantize_model
from lightning_n2uq.ops.dispatch import force

BASE = "float, torchvision"


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps for the backward pass, parameters excluded, every storage counted once."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        kept.setdefault(t.untyped_storage().data_ptr(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model.train()(x)
    del y
    return sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in own)


def memory(models: dict[str, nn.Module], x: Tensor) -> dict[str, object]:
    """Megabytes kept by every network, and their ratio to the float network's."""
    base = kept_bytes(models[BASE], x)
    result: dict[str, object] = {}
    for name, model in models.items():
        kept = kept_bytes(model, x)
        result[name] = {"megabytes": round(kept / 1e6, 2), "ratio": round(kept / base, 4)}
        if model is not models[BASE]:
            with force("reference"):
                plain = kept_bytes(model, x)
            result[f"{name}, without kernels"] = {
                "megabytes": round(plain / 1e6, 2),
                "ratio": round(plain / base, 4),
            }
    return result


def _step(model: nn.Module, x: Tensor, target: Tensor) -> Callable[[], object]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def run() -> object:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        return loss

    return run


def run(device: torch.device, seconds: float, batch: int = 8, size: int = 224) -> dict[str, object]:
    """Step time and memory of W2A2 and W4A4; prints both tables."""
    x = torch.randn(batch, 3, size, size, device=device)
    target = torch.randint(1000, (batch,), device=device)
    models = {BASE: torchvision.models.resnet18(), "W2A2": resnet18(2, 2), "W4A4": resnet18(4, 4)}
    models = {name: model.to(device).train() for name, model in models.items()}
    converted = quantize_model(
        torchvision.models.resnet18(), {"weight_bits": 2, "activation_bits": 2}, calibration=[x.cpu()]
    )
    kept = memory(models | {"W2A2, converted": converted.model.to(device)}, x)
    print(f"ResNet-18, {batch} x {size}x{size}, fp32: kept for the backward pass")
    for name, figures in kept.items():
        print(f"  {name:<34} {figures['megabytes']:>9} MB   {figures['ratio']}x")
    steps = {name: _step(model, x, target) for name, model in models.items()}
    times = summary(take_turns(steps, seconds, device), BASE)
    print(table(f"ResNet-18 training step, {batch} x {size}x{size}, fp32", times))
    return {"batch": batch, "size": size, "memory": kept, "step": times}
