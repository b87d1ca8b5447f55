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

from benchmarks.netlab.methods import LOCAL, METHODS
from benchmarks.netlab.network import INTERFACE
from lightning_n2uq.distributed import LocalRounds
from lightning_n2uq.scaling.volume import shapes
from lightning_n2uq.strategies import NUQSGDState

_WARM_UP_ROUNDS = 2
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


def measure_rounds(method: str, numel: int, rounds: int) -> dict[str, object]:
    """Return seconds and bytes per step of the slowest rank, a step's share of its round included.

    As for the others the clock runs in the backward passes and in the exchange, but not in the optimizer.
    """
    source = GradientSource(numel, seed=dist.get_rank())
    local = LocalRounds(source, **LOCAL[method])
    local.start(torch.device("cpu"))
    period, seconds, before = local.local.period, [], 0
    for number in range(_WARM_UP_ROUNDS + rounds):
        dist.barrier()
        if number == _WARM_UP_ROUNDS:
            before = sent_bytes()
        seconds.append(_round_s(source, local) / period)
    figures = [*seconds[_WARM_UP_ROUNDS:], (sent_bytes() - before) / rounds / period]
    slowest = torch.tensor(figures, dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    *times, sent = slowest.tolist()
    local.end()
    return {
        "method": method,
        "numel": sum(weight.numel() for weight in source.weights),
        "period": period,
        "seconds": times,
        "bytes": sent,
    }


def _round_s(source: GradientSource, local: LocalRounds) -> float:
    """Return the seconds of one round's backward passes and of its exchange."""
    optimizer, seconds = torch.optim.SGD(source.parameters(), lr=0.01), 0.0
    for _ in range(local.local.period):
        source.zero_grad(set_to_none=False)
        began = time.perf_counter()
        source().backward()
        seconds += time.perf_counter() - began
        optimizer.step()
    dist.barrier()
    local.steps = local.local.period
    began = time.perf_counter()
    local.close()
    return seconds + time.perf_counter() - began


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
        call = measure_rounds if method in LOCAL else measure
        figures.append(call(method, options.numel, options.steps))
        if dist.get_rank() == 0:
            options.output.write_text(json.dumps(figures))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
