"""The layer that broke the loss, found by repeating the forward pass of a batch."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lightning_n2uq.callbacks._guard.checks import broken_flag, floating_tensors
from lightning_n2uq.quantizers.looks import looking


@torch.no_grad()
def first_broken_output(trainer: Trainer, pl_module: LightningModule, batch: object) -> str | None:
    """Returns the name of the first layer whose output has NaN or inf as a batch passes through the network.

    The forward pass of the batch's first floating point tensor is repeated in the network's current mode;
    running statistics and random numbers are restored. All ranks have to call it, since layers may
    communicate.

    Returns:
        A name in `pl_module`; an empty text if no output of a layer is broken; None if it cannot be said,
        because the network does not take one tensor.
    """
    tensors = floating_tensors(batch)
    if not tensors:
        return None
    found: list[str] = []
    hooks = [
        part.register_forward_hook(_finder(name, found)) for name, part in pl_module.named_modules() if name
    ]
    buffers = list(pl_module.buffers())
    before = [buffer.clone() for buffer in buffers]
    devices = [pl_module.device] if pl_module.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), trainer.precision_plugin.forward_context(), looking():
            pl_module(tensors[0])
    except Exception:  # whatever a network does with one tensor
        return found[0] if found else None
    finally:
        for hook in hooks:
            hook.remove()
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
    return found[0] if found else ""


def _finder(name: str, found: list[str]) -> Any:  # noqa: ANN401 -- torch's hook type
    def find(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        # Inner layers end before those around them, so that the first is the innermost.
        tensors = [] if found else floating_tensors(output)
        if tensors and bool(broken_flag(tensors)):
            found.append(name)

    return find
