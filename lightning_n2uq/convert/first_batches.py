"""Fits input ranges to the first batches of a training run, inside its own forward passes.

Before the first forward pass of a module in training, the same input runs through it once more: without
gradients, with all quantizers off, as in `calibrate`. So no loader is read twice, whatever a batch is and
whatever a training step does with it; random numbers and buffers stay what they were.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_n2uq.convert.calibration import quantizers_off, set_weight_quantizers
from lightning_n2uq.convert.ranged_input import RangedInput
from lightning_n2uq.quantizers.base import mean_over_processes
from lightning_n2uq.utils.compat import uncompiled_call


class FirstBatches:
    """Watches the modules of a network whose quantizers have no range yet.

    Args:
        model: A network after `quantize_model`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._samples: dict[nn.Module, list[Tensor]] = defaultdict(list)
        self._pending = {
            module: name.removesuffix(".activation_quantizer")
            for name, module in model.named_modules()
            if isinstance(module, RangedInput) and not module.fitted
        }
        self._reached: set[nn.Module] = set()
        self._seen: set[nn.Module] = set()  # quantizers that this batch has reached
        self._running = False
        self._handles: list[RemovableHandle] = []
        for module in model.modules():
            if module not in self._pending and not self._pending.keys().isdisjoint(module.modules()):
                handle = module.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True)
                self._handles.append(handle)

    @property
    def ranges(self) -> int:
        """Returns how many quantizers have been fitted."""
        return len(self._reached)

    @property
    def unreached(self) -> list[str]:
        """Returns the names of the layers whose quantizer no batch has reached."""
        return [name for module, name in self._pending.items() if module not in self._reached]

    def next_batch(self) -> None:
        """Says that what comes next belongs to another batch: ranges are fitted again, to all so far."""
        self._seen.clear()

    def close(self) -> None:
        """Takes the hooks off the modules."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._samples.clear()

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._running or not module.training or _redirected(module):
            return
        inside = [m for m in module.modules() if m in self._pending and m not in self._seen]
        if not inside:
            return
        self._running = True
        try:
            with _unchanged(module), torch.no_grad(), quantizers_off(module, self._samples):
                uncompiled_call(module)(*args, **kwargs)
        finally:
            self._running = False
        from torch.distributed.fsdp import FSDPModule  # slow to import, and wanted once

        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()  # what is written to parameters that are gathered for a forward pass is lost
        self._fit(inside)
        set_weight_quantizers(module, again=False)

    @torch.no_grad()
    def _fit(self, quantizers: Sequence[nn.Module]) -> None:
        """Sets the ranges, averaged over the processes that have data for a quantizer."""
        device = next(quantizers[0].parameters()).device
        found = [self._range(quantizer) for quantizer in quantizers]
        mean = mean_over_processes(torch.cat(found).to(device)).split([len(row) for row in found])
        for row, quantizer in zip(mean, quantizers, strict=True):
            share = row[-1]
            if share > 0:
                low, high = (row[:-1] / share).chunk(2)
                shape = () if len(low) == 1 else low.shape
                quantizer.set_range(low.reshape(shape), high.reshape(shape))  # type: ignore[operator]
                self._reached.add(quantizer)
                self._seen.add(quantizer)

    def _range(self, quantizer: nn.Module) -> Tensor:
        """Returns both ends of a quantizer's range, of every part of its input, and 1; zeros without data."""
        values = self._samples.get(quantizer)
        assert isinstance(quantizer, RangedInput)
        sample = torch.cat(values, -1).cpu() if values else torch.zeros(0)
        if sample.numel() and bool(sample.isfinite().all()) and bool(sample.min() < sample.max()):
            low, high = (end.double().reshape(-1) for end in quantizer.range_of(sample))
            return torch.cat([low, high, torch.ones(1, dtype=torch.float64)])
        return torch.zeros(2 * quantizer.parts + 1, dtype=torch.float64)


def _redirected(module: nn.Module) -> bool:
    """Returns whether a call of the module runs something else, as Lightning's strategies have it."""
    own = vars(module).get("forward")
    return own is not None and getattr(own, "__func__", None) is not type(module).forward


@contextmanager
def _unchanged(module: nn.Module) -> Iterator[None]:
    """Brings buffers and random numbers back to what they were."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    devices = list({p.device for p in module.parameters() if p.is_cuda})
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices))
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
