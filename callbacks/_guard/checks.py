"""What is wrong with a batch, a gradient or a network: cheap flags on the device, names once one is set."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from lightning_n2uq.ops.tables import WIDTH_FLOOR
from lightning_n2uq.quantizers import Quantizer
from lightning_n2uq.quantizers.base import STEP_FLOOR
from lightning_n2uq.utils.compat import BatchNorm

_SCALES = ("scale_in", "scale_out")  # of learned thresholds
_NAMED = 3  # more names would hide the first


def floating_tensors(batch: object) -> list[Tensor]:
    """Returns the floating point tensors in nested tuples, lists and mappings, without empty ones."""
    if isinstance(batch, Tensor):
        return [batch] if batch.is_floating_point() and batch.numel() else []
    children: Iterable[Any] = ()
    if isinstance(batch, dict):
        children = batch.values()
    elif isinstance(batch, list | tuple):
        children = batch
    return [tensor for child in children for tensor in floating_tensors(child)]


def batch_flags(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Returns whether a batch holds NaN or inf, and whether it is constant, as 0-d bool tensors.

    One pass finds smallest and largest value, both of which NaN and inf reach. Constant means that both
    are equal: batch norm then divides by its epsilon only. At least one tensor is needed.
    """
    pairs = [torch.aminmax(tensor.detach()) for tensor in tensors]
    broken = torch.stack([~(torch.isfinite(pair.min) & torch.isfinite(pair.max)) for pair in pairs]).any()
    several = any(len(tensor) > 1 for tensor in tensors if tensor.ndim)
    equal = torch.stack([pair.min == pair.max for pair in pairs]).all()
    return broken, equal if several else torch.zeros_like(equal)


def broken_flag(tensors: Sequence[Tensor]) -> Tensor:
    """Returns whether any of the tensors (at least one) holds NaN or inf, as a 0-d bool tensor."""
    own = [own_part(tensor.detach()) for tensor in tensors]
    full = [tensor for tensor in own if tensor.numel()]  # an empty one has no largest value
    return ~torch.isfinite(get_total_norm(full, norm_type=float("inf")))


def suspect_flag(tensors: Sequence[Tensor]) -> Tensor:
    """Returns `broken_flag` in a third of the time, but also True where the sum of squares overflows."""
    with torch.no_grad():
        return ~torch.isfinite(get_total_norm([own_part(tensor) for tensor in tensors], norm_type=2.0))


def own_part(tensor: Tensor) -> Tensor:
    """Returns this rank's shard of a tensor that FSDP2 has sharded, else the tensor; ranks agree later."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Returns gradients that are not empty, by parameter name."""
    found = ((name, parameter.grad) for name, parameter in module.named_parameters())
    own = ((name, own_part(grad.detach())) for name, grad in found if grad is not None)
    return {name: grad for name, grad in own if grad.numel()}


def norm_statistics(module: nn.Module) -> list[Tensor]:
    """Returns the buffers of batch norms: running statistics and their counters."""
    norms = (part for part in module.modules() if isinstance(part, BatchNorm))
    return [buffer for norm in norms for buffer in norm.buffers()]


def parameters(module: nn.Module) -> dict[str, Tensor]:
    """Returns parameters that are not empty, by name."""
    own = ((n, own_part(p.detach())) for n, p in module.named_parameters() if p.is_floating_point())
    return {name: parameter for name, parameter in own if parameter.numel()}


def state_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Returns parameters and running statistics that are not empty, by name."""
    statistics = {id(buffer) for buffer in norm_statistics(module)}
    buffers = {
        name: value.detach()
        for name, value in module.named_buffers()
        if id(value) in statistics and value.is_floating_point() and value.numel()
    }
    return parameters(module) | buffers


def broken_names(tensors: dict[str, Tensor]) -> str:
    """Returns the names of tensors with NaN or inf; waits for the device."""
    return some_names([name for name, value in tensors.items() if not bool(torch.isfinite(value).all())])


def collapsed_widths(module: nn.Module) -> list[str]:
    """Returns quantizers with widths at the floor, where no gradient moves them; waits for the device."""
    found = []
    for name, quantizer in module.named_modules():
        widths = getattr(quantizer, "widths", None)
        if isinstance(quantizer, Quantizer) and isinstance(widths, Tensor):
            whole = widths.full_tensor() if isinstance(widths, DTensor) else widths
            count = int((whole.detach() <= WIDTH_FLOOR).sum())
            if count:
                found.append(f"{name}.widths ({count} of {widths.numel()})")
    return found


def collapsed_scales(module: nn.Module) -> list[str]:
    """Returns quantizers' steps and clips at their floor and other scales at or below zero.

    Waits for the device once.
    """
    scales = [
        (f"{name}.{own}", value.detach(), STEP_FLOOR if own in part.positive else 0.0)
        for name, part in module.named_modules()
        if isinstance(part, Quantizer)
        for own, value in part.named_parameters(recurse=False)
        if (own in part.positive or own in _SCALES) and value.numel()
    ]
    if not scales:
        return []
    values, _ = _ends([value for _, value, _ in scales])
    found = zip(scales, values, strict=True)
    return [f"{name} ({value:.3g})" for (name, _, floor), value in found if value <= floor]


def degenerate_weights(module: nn.Module) -> list[str]:
    """Returns layers whose weights are all equal or all zero; waits for the device."""
    named = [(n, p.detach()) for n, p in module.named_parameters() if p.ndim > 1 and p.numel() > 1]
    if not named:
        return []
    ends = _ends([weight for _, weight in named])
    return [
        f"{name} (all {'zero' if low == 0 else 'equal'})"
        for (name, _), low, high in zip(named, *ends, strict=True)
        if low == high
    ]


def _ends(tensors: Sequence[Tensor]) -> tuple[list[float], list[float]]:
    """Returns smallest and largest values, of sharded tensors over all ranks; one collective, one wait."""
    lows, highs = [], []
    for own in map(own_part, tensors):
        empty = own.new_full((1,), float("inf"))
        low, high = torch.aminmax(own) if own.numel() else (empty[0], -empty[0])
        lows.append(low.float())
        highs.append(high.float())
    ends = torch.stack([-torch.stack(lows), torch.stack(highs)])
    if any(isinstance(tensor, DTensor) for tensor in tensors):
        dist.all_reduce(ends, dist.ReduceOp.MAX)
    return (-ends[0]).tolist(), ends[1].tolist()


def some_names(names: Sequence[str]) -> str:
    """Returns the first names, and how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
