"""Measures how fast one thread encodes, decodes, casts, adds and runs PowerSGD, in GB/s of fp32."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.netlab.methods import METHODS
from benchmarks.netlab.worker import GradientSource
from lightning_n2uq.compression import NUQCodec
from lightning_n2uq.scaling.cluster import Speeds
from lightning_n2uq.scaling.volume import UNIT

BITS = (2, 3, 4, 8)


def best(call: Callable[[], object], rounds: int = 9) -> float:
    """Return the least processor time of some runs in seconds, after one that is not counted.

    Processor time, not the clock's: other work on the machine hardly changes it.
    """
    call()
    seconds = []
    for _ in range(rounds):
        began = time.process_time()
        call()
        seconds.append(time.process_time() - began)
    return min(seconds)


def measure_speeds(numel: int = UNIT) -> dict[str, Any]:
    """Return the fields of :class:`Speeds`, as measured on one thread with pieces of the pipeline's size."""
    torch.set_num_threads(1)
    x, y = torch.randn(numel), torch.randn(numel)
    half, total = x.half(), x.clone()
    gigabytes = 4e-9 * numel
    found: dict[str, Any] = {"encode": {}, "decode": {}}
    for bits in BITS:
        codec = NUQCodec(bits, levels="float" if bits == 8 else "exponential")
        payload = codec.encode(x, seed=0)
        found["encode"][bits] = gigabytes / best(lambda c=codec, p=payload: c.encode(x, seed=0, out=p))
        found["decode"][bits] = gigabytes / best(lambda c=codec, p=payload: c.decode(p, numel, out=y))
    casts = best(lambda: half.copy_(x)) + best(lambda: y.copy_(half))
    return found | {
        "half": 2 * gigabytes / casts,
        "reduce": gigabytes / best(lambda: total.add_(x)),
        "powersgd": _powersgd(),
    }


def _powersgd(numel: int = 11_000_000) -> float:
    """Return the rate of torch's hook, without network: one rank, plain DDP's time taken off."""
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{Path(folder, 'store')}", rank=0, world_size=1)
        seconds = {}
        for method in ("ddp", "ddp_powersgd"):
            model = DistributedDataParallel(GradientSource(numel, seed=0))
            state = METHODS[method](model)
            for _ in range(4):  # PowerSGD starts at the third step
                model().backward()
            seconds[method] = best(lambda model=model: model().backward(), rounds=5)
            if hasattr(state, "close"):
                state.close()
        dist.destroy_process_group()
    return 4e-9 * numel / max(1e-9, seconds["ddp_powersgd"] - seconds["ddp"])


def speeds_from(saved: dict[str, Any]) -> Speeds:
    """Return the speeds from what was saved as JSON, whose keys are text."""
    by_bits = {name: {int(bits): rate for bits, rate in saved[name].items()} for name in ("encode", "decode")}
    return Speeds(**(saved | by_bits))
