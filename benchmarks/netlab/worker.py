"""One rank of the lab: synchronises given gradients through real DDP and measures it."""

from __future__ import annotations

import argparse
import json
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.netlab.methods import METHODS
from benchmarks.netlab.network import INTERFACE
from lightning_n2uq.strategies import NUQSGDState

_WARM_UP = 4  # DDP rebuilds its buckets after the first step; PowerSGD starts at the third


class _Deliver(torch.autograd.Function):
    """Costs nothing forward and hands a given gradient to DDP backward."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, weight: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return weight.new_zeros(())

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *_: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0], None


class GradientSource(nn.Module):
    """Parameters of the shapes of ResNet-18 (10 classes) and heavy-tailed gradients for them.

    Args:
        numel: Coordinates wanted; layers are dropped from the end or repeated to come close.
        seed: Of the gradients.
    """

    def __init__(self, numel: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weights = nn.ParameterList(nn.Parameter(torch.zeros(shape)) for shape in shapes(numel))
        # Laplace: the difference of two exponential variables.
        self.gradients = [
            torch.empty(w.shape).exponential_(generator=generator)
            - torch.empty(w.shape).exponential_(generator=generator)
            for w in self.weights
        ]

    def forward(self) -> Tensor:
        """Return a scalar whose gradient is the given one."""
        return torch.stack(
            [_Deliver.apply(w, g) for w, g in zip(self.weights, self.gradients, strict=True)]
        ).sum()


def shapes(numel: int) -> list[tuple[int, ...]]:
    """Return parameter shapes of ResNet-18's layers with about ``numel`` coordinates in all."""
    found: list[tuple[int, ...]] = []
    total = 0
    while True:
        for width, below in ((64, 64), (128, 64), (256, 128), (512, 256)):
            for fan_in in (below, width, width, width):
                if total >= numel:
                    return found
                found += [(width, fan_in, 3, 3), (width,), (width,)]
                total += width * fan_in * 9 + 2 * width


def sent_bytes() -> int:
    """Return the bytes that left the host so far, counted by the kernel with all headers."""
    return int(Path(f"/sys/class/net/{INTERFACE}/statistics/tx_bytes").read_text())


def measure(method: str, numel: int, steps: int) -> dict[str, object]:
    """Return seconds and bytes per step of the slowest rank."""
    rank = dist.get_rank()
    source = GradientSource(numel, seed=rank)
    model = DistributedDataParallel(source)
    state = METHODS[method](model)
    seconds: list[float] = []
    before = 0
    for step in range(_WARM_UP + steps):
        model.zero_grad(set_to_none=False)
        dist.barrier()
        if step == _WARM_UP:
            before = sent_bytes()
        began = time.perf_counter()
        model().backward()
        seconds.append(time.perf_counter() - began)
    figures = torch.tensor([*seconds[_WARM_UP:], (sent_bytes() - before) / steps], dtype=torch.float64)
    dist.all_reduce(figures, dist.ReduceOp.MAX)
    *slowest, sent = figures.tolist()
    coordinates = sum(weight.numel() for weight in source.weights)
    found = {"method": method, "numel": coordinates, "seconds": slowest, "bytes": sent}
    if isinstance(state, NUQSGDState) and state.stats is not None and state.stats.last is not None:
        found["collective_bytes"] = state.stats.last.sent_bytes  # rank 0's: without headers
    return found


def main() -> None:
    """Join the others and write the figures to a file on rank 0."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--methods", nargs="+", required=True)
    parser.add_argument("--numel", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    figures = []
    for method in options.methods:
        figures.append(measure(method, options.numel, options.steps))
        if dist.get_rank() == 0:
            options.output.write_text(json.dumps(figures))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
