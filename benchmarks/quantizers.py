"""Activation quantizers, forward and backward: ours, the same in eager torch, and other libraries'."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.timing import summary, table, take_turns
from lightning_n2uq.ops import reference, threshold_quantize

SHAPE = (32, 64, 56, 56)
BASE = "torch fused LSQ"


def parameters(bits: int, device: torch.device) -> list[Tensor]:
    """First values of the threshold quantizer's parameters."""
    n = 2**bits - 1
    values = (torch.zeros(1), torch.full((n,), 2 / n), torch.ones(1), torch.ones(1))
    return [v.to(device).requires_grad_() for v in values]


def candidates(
    shape: tuple[int, ...], bits: int, device: torch.device, peers: bool = True
) -> dict[str, Callable[[], object]]:
    """Forward and backward of every quantizer that is installed, on one input and one gradient."""
    x = (torch.randn(shape, device=device) * 1.3 + 0.5).requires_grad_()
    grad = torch.randn(shape, device=device)
    mine = parameters(bits, device)
    scale = torch.tensor([2 / (2**bits - 1)], device=device, requires_grad=True)
    zero = torch.zeros(1, device=device, requires_grad=True)

    def ours() -> object:
        return torch.autograd.grad(threshold_quantize(x, *mine), [x, *mine], grad)

    def fused_lsq() -> object:
        fused = torch._fake_quantize_learnable_per_tensor_affine
        return torch.autograd.grad(fused(x, scale, zero, 0, 2**bits - 1, 1.0), [x, scale], grad)

    def eager() -> object:
        return torch.autograd.grad(reference.threshold_quantize_ste(x, *mine), [x, *mine], grad)

    result: dict[str, Callable[[], object]] = {"lightning_n2uq": ours, BASE: fused_lsq}
    if peers:
        result["the same quantizer, eager torch"] = eager
        result |= _brevitas(x, grad, bits) | _torchao(x, grad, bits)
    return result | {"memory traffic (copies)": _traffic(x)}


def _brevitas(x: Tensor, grad: Tensor, bits: int) -> dict[str, Callable[[], object]]:
    try:
        from brevitas.nn import QuantReLU
    except ImportError:
        return {}
    layer = QuantReLU(bit_width=bits, collect_stats_steps=1).to(x.device).train()
    layer(x.detach())

    def run() -> object:
        return torch.autograd.grad(layer(x), [x, *layer.parameters()], grad)

    return {"Brevitas QuantReLU": run}


def _torchao(x: Tensor, grad: Tensor, bits: int) -> dict[str, Callable[[], object]]:
    try:
        from torchao.quantization.qat import IntxFakeQuantizeConfig, IntxFakeQuantizer
    except ImportError:
        return {}
    dtype = getattr(torch, f"uint{bits}")
    layer = IntxFakeQuantizer(IntxFakeQuantizeConfig(dtype, "per_token", is_symmetric=False))

    def run() -> object:
        return torch.autograd.grad(layer(x), x, grad)

    return {"torchao IntxFakeQuantizer": run}


def _traffic(x: Tensor) -> Callable[[], object]:
    """The bytes that forward and backward must move: read x, write y; read x and g, write dx."""
    source = x.detach().flatten()
    target, half = torch.empty_like(source), source.numel() // 2

    def run() -> object:
        target.copy_(source)
        target.copy_(source)
        return target[:half].copy_(source[:half])

    return run


def run(device: torch.device, seconds: float, shape: tuple[int, ...] = SHAPE) -> dict[str, object]:
    """Figures at 2, 3 and 4 bits; prints a table for each."""
    result: dict[str, object] = {"shape": list(shape)}
    for bits in (2, 3, 4):
        figures = summary(take_turns(candidates(shape, bits, device), seconds, device), BASE)
        print(table(f"activation quantizer, forward + backward, {bits} bits, {shape}, fp32", figures))
        result[f"{bits} bits"] = figures
    return result
