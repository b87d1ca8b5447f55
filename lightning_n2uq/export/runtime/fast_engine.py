"""The deployed network at the speed of integers, on the CPU: the results of `ExactNetwork`, bit by bit.

A plan is made once from the description (`fast/plan.py`). Convolutions of codes run as integer convolutions
(`lightning_n2uq.ops.integer_conv2d`), and what lies between two of them is one compiled pass over
channels-last maps that ends in the next layer's codes (`fast/loops.py`). Steps that the plan does not know
run as in `torch_engine`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lightning_n2uq.export.ir.description import Description
from lightning_n2uq.export.runtime.fast.groups import Values
from lightning_n2uq.export.runtime.fast.layers import dense
from lightning_n2uq.export.runtime.fast.plan import Plan


class FastNetwork(nn.Module):
    """Executes a `Description` on the CPU; nothing is trainable.

    Results do not depend on threads, batch size or memory layout, and are those of `ExactNetwork`.

    Args:
        description: The network to execute.
    """

    def __init__(self, description: Description) -> None:
        super().__init__()
        self.description = description
        self.plan = Plan(description)

    def forward(self, images: Tensor) -> Tensor:
        """Returns the logits `[N, classes]` of images `[N, C, H, W]`."""
        return self.run(images, ())[self.description.output]

    @torch.no_grad()
    def run(self, images: Tensor, names: Iterable[str] | None = None) -> Values:
        """Returns logits and codes by step name.

        Args:
            images: `[N, C, H, W]` in the network's dtype, on the CPU; int32 up to 2^24.
            names: Of which quantizers the codes are wanted; all by default.

        Raises:
            ValueError: The images do not fit the network, or are not on the CPU.
        """
        self.description.check_input(str(images.dtype).removeprefix("torch."), images.shape)
        if images.device.type != "cpu":
            raise ValueError(f"images: got device {images.device}, allowed is cpu")
        wanted = {step.name for step in self.description.quantizers()} if names is None else set(names)
        if images.dtype == torch.int32:  # sums, which groups read as float32
            images = images.float()
        values = {**self.plan.constants, self.description.input.name: dense(images)}
        with torch.autocast("cpu", enabled=False):
            for operation in self.plan.operations:
                operation.run(values)
                for name in operation.frees:
                    if name not in wanted:
                        del values[name]
        return {name: values[name] for name in (*wanted, self.description.output)}
