"""What synchronising in full precision would cost on this network: one measured all-reduce."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist


def time_all_reduce(coordinates: int, device: torch.device, limit: int = 1 << 22) -> float:
    """Return the seconds an fp32 all-reduce over the default group takes. A collective call.

    Args:
        coordinates: Size of the gradient.
        device: Of the gradient.
        limit: Measure at most this many coordinates and scale up, to bound the time on slow links.
    """
    measured = max(1, min(coordinates, limit))
    values = torch.zeros(measured, device=device)
    dist.all_reduce(values[:1])  # connects, and lets the ranks start together
    _wait(device)
    began = time.perf_counter()
    dist.all_reduce(values)
    _wait(device)
    return (time.perf_counter() - began) * coordinates / measured


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
