"""Measures, in a run, what `n2uq advise` needs: step time, link, what codecs would lose of its gradients."""

from __future__ import annotations

import time
from collections.abc import Iterable
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_n2uq.compression import CODECS, Codec, make_codec
from lightning_n2uq.distributed.config import ExchangeConfig
from lightning_n2uq.distributed.hook import plain_name
from lightning_n2uq.scaling.measured import ERRORS, PREFIX

SAMPLE = 1 << 17
"""Coordinates of the gradient on which codecs are tried."""
_PIECE = 1024  # consecutive coordinates: codecs share a norm among them
_LINK_NUMEL = 1 << 18
_KEPT = 200  # durations of steps


class Recorder:
    """Figures of one run, on every rank alike but for errors, which rank 0 measures."""

    def __init__(self) -> None:
        self._figures: dict[str, float] = {}
        self._durations: list[float] = []
        self._mark: float | None = None
        self._step = -1

    def start(
        self,
        module: nn.Module,
        device: torch.device,
        ranks_per_node: int,
        config: ExchangeConfig,
        period: int = 1,
    ) -> None:
        """Counts what will be averaged, and times the link. A collective call where there are several ranks.

        Args:
            module: What is trained.
            device: Where its gradients are.
            ranks_per_node: The ranks of this node.
            config: Says which parameters travel in full precision.
            period: Optimizer steps between two exchanges.
        """
        trained = {plain_name(name): p for name, p in module.named_parameters() if p.requires_grad}
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self._figures |= {
            "ranks": dist.get_world_size() if several else 1,
            "ranks_per_node": ranks_per_node,
            "period": period,
            "coordinates": sum(p.numel() for p in trained.values()),
            "exact": sum(p.numel() for name, p in trained.items() if config.travels_exactly(name, p)),
        }
        if several:
            mbit, latency = time_link(device)
            self._figures |= {"link_mbit": mbit, "latency_s": latency}

    def pause(self) -> None:
        """Leaves out the time until the next batch: evaluation, checkpoints, the end of an epoch."""
        self._mark = None

    def begin_batch(self) -> None:
        """Starts the clock, unless it runs."""
        if self._mark is None:
            self._mark = time.perf_counter()

    def end_batch(self, step: int) -> None:
        """Notes the duration of a step, once its last batch has ended.

        Args:
            step: The number of optimizer steps so far.
        """
        if self._mark is None or step == self._step:
            return
        now = time.perf_counter()
        if self._step >= 0:  # the first step allocates and compiles
            self._durations = [*self._durations[1 - _KEPT :], now - self._mark]
            self._figures["step_s"] = median(self._durations)
        self._mark, self._step = now, step

    @torch.no_grad()
    def look_at(self, parameters: Iterable[nn.Parameter], norm_sq: float = 0.0) -> None:
        """Tries codecs on the gradients.

        Args:
            parameters: Those whose averaged gradients are looked at.
            norm_sq: The squared norm of this rank's own gradient, 0 if unknown.
        """
        gradients = [p.grad for p in parameters if p.grad is not None and not p.grad.is_sparse]
        total = sum(float(gradient.float().square().sum()) for gradient in gradients)
        if norm_sq > 0 and total > 0:
            self._figures["spread"] = norm_sq / total
        sample = _sample([g for g in gradients if g.dim() > 1 and g.numel() >= _PIECE])
        if sample.numel() and float(sample.square().sum()) > 0:
            for name in CODECS:
                self._figures[ERRORS.removeprefix(PREFIX) + name] = relative_error(make_codec(name), sample)

    def metrics(self) -> dict[str, float]:
        """Returns the figures under the names by which they are logged."""
        return {PREFIX + name: float(value) for name, value in self._figures.items()}


def relative_error(codec: Codec, values: Tensor, seed: int = 0) -> float:
    """Returns the squared error of one message over the squared norm of what it is about."""
    decoded = codec.decode(codec.encode(values, seed), values.numel())
    return float((decoded - values).square().sum() / values.square().sum())


def _sample(gradients: list[Tensor]) -> Tensor:
    """Returns whole pieces of every gradient, in proportion to its size."""
    total = sum(gradient.numel() for gradient in gradients)
    pieces = []
    for gradient in gradients:
        wanted = min(gradient.numel(), -(-gradient.numel() * SAMPLE // max(total, 1)))
        pieces.append(gradient.flatten()[: -(-wanted // _PIECE) * _PIECE].float())
    return torch.cat(pieces) if pieces else torch.empty(0)


def time_link(device: torch.device) -> tuple[float, float]:
    """Returns the link's Mbit/s and the seconds of one step of a collective, from fp32 all-reduces.

    A collective call of all ranks.

    Args:
        device: Where the tensors are.
    """
    ranks = dist.get_world_size()
    empty = min(_all_reduce_s(1, device) for _ in range(3))
    full = min(_all_reduce_s(_LINK_NUMEL, device) for _ in range(2))
    seconds = torch.tensor([empty, full], dtype=torch.float64).to(device, torch.float32)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    empty, full = seconds.tolist()
    bits = 8 * 4 * _LINK_NUMEL * 2 * (ranks - 1) / ranks
    return bits / max(full - empty, 1e-9) / 1e6, empty / (2 * (ranks - 1))


def _all_reduce_s(numel: int, device: torch.device) -> float:
    values = torch.zeros(numel, device=device)
    dist.all_reduce(values[:1])  # lets the ranks start together
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    dist.all_reduce(values)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
