"""One training run of a small network, by plain DDP or by the exchange, that returns its numbers."""

from __future__ import annotations

import contextlib
import os
import random
import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_n2uq.distributed import NUQSGDState, nuqsgd_hook

TINY_BUCKETS = 0.01  # MiB: about one layer per DDP bucket
SMALL_UNITS = {"bucket_size": 256, "unit_numel": 4096, "min_numel": 64}
FEATURES, CLASSES, BATCH = 32, 10, 8


def join(rank, world_size, folder, seconds=60):
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=seconds),
    )


def leave():
    """Waits for the other ranks and leaves the process group."""
    dist.barrier()
    dist.destroy_process_group()


def run_all(checks, rank):
    """What every check has returned, by its name, and the seconds that each took; then leaves."""
    found, taken = {}, {}
    for check in checks:
        began = time.perf_counter()
        found[check.__name__] = check(rank)
        taken[check.__name__] = time.perf_counter() - began
    leave()
    return found | {"seconds": taken}


@contextlib.contextmanager
def exchange(**settings):
    state = NUQSGDState(**(SMALL_UNITS | settings))
    try:
        yield state
    finally:
        state.close()


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(FEATURES, 96),
        nn.ReLU(),
        nn.BatchNorm1d(96),
        nn.Linear(96, 64),
        nn.ReLU(),
        nn.Linear(64, CLASSES),
    )


class Branches(nn.Module):
    """Every rank uses another branch at every other step, and nobody the last one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.branches = nn.ModuleList(nn.Linear(FEATURES, 40) for _ in range(3))
        self.head = nn.Linear(40, CLASSES)
        self.calls = dist.get_rank()

    def forward(self, x):
        self.calls += 1
        return self.head(self.branches[self.calls % 2](x))


class Twice(nn.Module):
    """A layer that is applied twice, which DDP allows with `static_graph`."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, CLASSES)

    def forward(self, x):
        return self.head(self.layer(self.layer(x).relu()))


def odd_net():
    """Sizes without a common divisor: every cut has a tail, some chunks are empty."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 47), nn.ReLU(), nn.Linear(47, 1), nn.Linear(1, CLASSES))


def frozen_net():
    net = make_net()
    net[0].requires_grad_(False)
    return net


NETS = {"plain": make_net, "branches": Branches, "twice": Twice, "odd": odd_net, "frozen": frozen_net}


def flat(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def gradients(module):
    """All gradients in one vector, zeros where there is none."""
    found = [p.grad if p.grad is not None else torch.zeros_like(p) for p in module.parameters()]
    return torch.cat([gradient.detach().flatten() for gradient in found])


@dataclass(frozen=True)
class Training:
    """What is trained and how, by plain DDP and by the exchange alike."""

    net: str = "plain"
    ranks: int = 2  # as many, or all of them
    steps: int = 3
    dtype: torch.dtype = torch.float32
    autocast: bool = False
    compiled: bool = False
    accumulate: int = 1
    ddp: tuple[tuple[str, object], ...] = ()

    def run(self, state=None, group=None, hook=nuqsgd_hook):
        """The gradients of every step and the parameters at the end, as arrays."""
        net = NETS[self.net]().to(self.dtype)
        net = torch.compile(net, backend="aot_eager") if self.compiled else net
        found = []
        values = train(
            state,
            hook,
            steps=self.steps,
            accumulate=self.accumulate,
            net=net,
            autocast=self.autocast,
            lr=0.1 if self.dtype == torch.float32 else 0.01,
            watch=lambda: found.append(gradients(net).float().numpy()),
            process_group=group,
            **dict(self.ddp),
        )
        return {"gradients": found, "parameters": values.float().numpy()}


def train(
    state,
    hook=nuqsgd_hook,
    steps=5,
    accumulate=1,
    uneven=False,
    net=None,
    lr=0.1,
    skip=0,
    autocast=False,
    watch=lambda: None,
    finish=lambda model: None,
    **ddp_arguments,
):
    """Train on this rank's own data and return the flat parameters.

    `watch` is called before each update, `finish` with the DDP module at the end.
    """
    rank = dist.get_rank()
    net = make_net() if net is None else net
    model = DistributedDataParallel(net, **ddp_arguments)
    if state is not None:
        model.register_comm_hook(state, hook)
    data = torch.Generator().manual_seed(rank)
    delays = random.Random(rank)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=lr)
    for _ in range(skip):  # batches that an earlier part of the run has seen
        _batch(data)
    for _ in range(steps):
        optimizer.zero_grad()
        for micro in range(accumulate):
            x, y = _batch(data)
            if uneven:
                time.sleep(delays.random() * 0.02)
            quiet = model.no_sync() if micro < accumulate - 1 else contextlib.nullcontext()
            with quiet, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = nn.functional.cross_entropy(model(x.to(trained[0].dtype)).float(), y)
                loss.backward()
        watch()
        optimizer.step()
    finish(model)
    return flat(net)


def train_with(steps=5, uneven=False, bucket_cap_mb=None, ddp=None, net=None, lr=0.1, **settings):
    arguments = dict(ddp or {}) | ({"bucket_cap_mb": bucket_cap_mb} if bucket_cap_mb else {})
    if "process_group" in settings:
        arguments["process_group"] = settings["process_group"]
    with exchange(**settings) as state:
        return train(state, steps=steps, uneven=uneven, net=net, lr=lr, **arguments)


def _batch(data):
    return torch.randn(BATCH, FEATURES, generator=data), torch.randint(CLASSES, (BATCH,), generator=data)
