"""Training in rounds by plain PyTorch: what the ranks of the common job find."""

from __future__ import annotations

import contextlib
import copy
import os
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from exchange_jobs.training import (
    BATCH,
    CLASSES,
    FEATURES,
    SMALL_UNITS,
    Branches,
    flat,
    frozen_net,
    join,
    make_net,
)
from lightning_n2uq.compression import IdentityCodec
from lightning_n2uq.distributed import LocalRounds

CPU = torch.device("cpu")
EXACT = {"codec": IdentityCodec()}
DILOCO = {"outer_lr": 0.7, "outer_momentum": 0.9}
BY_HAND = {
    "two phases": EXACT,
    "all-gather": EXACT | {"scheme": "all_gather"},
    "two nodes": EXACT | {"hierarchical": True, "ranks_per_node": 2},
    "DiLoCo": EXACT | DILOCO,
}
LOSSY = {
    "4 bits": {},
    "DiLoCo": DILOCO | {"scheme": "all_gather"},
    "2 bits, rotated": {"bits": 2, "rotation": "hadamard", "rounding": "eden"},
    "two nodes, feedback": {"hierarchical": True, "ranks_per_node": 2, "error_feedback": True, "bits": 8},
}


class Odd(nn.Module):
    """Parameters that no rank or only some ranks use, buffers of every kind, batch norm."""

    def __init__(self):
        super().__init__()
        self.norm, self.branches = nn.BatchNorm1d(FEATURES), Branches()
        self.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
        self.register_buffer("count", torch.tensor(dist.get_rank()))
        self.register_buffer("seen", torch.tensor(False))

    def forward(self, x):
        self.count += 1 + dist.get_rank()
        self.seen.fill_(True)
        return self.branches(self.norm(x))


class Loop:
    """A training loop of one rank on its own data."""

    def __init__(self, net, rounds=None, kind=torch.optim.SGD, **arguments):
        self.net, self.rounds = net, rounds
        self.model = DistributedDataParallel(net) if rounds is None else net
        trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
        self.optimizer = kind(trained, **({"lr": 0.1} | arguments))
        self.data = torch.Generator().manual_seed(dist.get_rank())

    def run(self, steps, count=True):
        for _ in range(steps):
            x = torch.randn(BATCH, FEATURES, generator=self.data)
            y = torch.randint(CLASSES, (BATCH,), generator=self.data)
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.model(x), y).backward()
            self.optimizer.step()
            if count and self.rounds is not None:
                self.rounds.step()
        return self


@contextlib.contextmanager
def in_rounds(net, **settings):
    rounds = LocalRounds(net, **(SMALL_UNITS | settings))
    rounds.start(CPU)
    try:
        yield rounds
    finally:
        rounds.end()


def gathered(values):
    rows = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, values)
    return torch.stack(rows)


def by_hand():
    """Two rounds by the exchange without loss, and by all ranks' weights in one tensor."""
    found = {}
    for name, settings in BY_HAND.items():
        net = make_net()
        agreed = nn.Parameter(flat(net).clone())
        outer = torch.optim.SGD(
            [agreed],
            settings.get("outer_lr", 1.0),
            settings.get("outer_momentum", 0.0),
            nesterov="outer_momentum" in settings,
        )
        with in_rounds(net, period=5, **settings) as rounds:
            loop = Loop(net, rounds, momentum=0.9)
            for steps in (5, 3):  # the second ends early
                loop.run(steps, count=False)
                total = torch.zeros(())
                for row in agreed.detach() - gathered(flat(net)):  # in rank order
                    total = total + row
                agreed.grad = total / dist.get_world_size()
                outer.step()
                rounds.steps = steps
                rounds.close()
        found[name] = {"rounds": flat(net).numpy(), "by hand": agreed.detach().numpy()}
    return found


def as_ddp():
    """With a period of 1, the mean, and inner SGD without momentum."""
    net, plain = make_net(), make_net()
    with in_rounds(net, period=1, **EXACT) as rounds:
        Loop(net, rounds).run(6)
    Loop(plain).run(6)
    return {"rounds": flat(net).numpy(), "ddp": flat(plain).numpy()}


def lossy():
    """What ranks have after every round, and what they counted."""
    found = {}
    for name, settings in LOSSY.items():
        net = Odd()
        own = []
        with in_rounds(net, period=3, **settings) as rounds:
            loop = Loop(net, rounds, torch.optim.Adam, lr=0.01)
            after = []
            for _ in range(2):
                loop.run(2)
                own.append(flat(net).numpy())
                statistics = gathered(net.norm.running_mean)
                loop.run(1)
                after.append(torch.cat([flat(net), net.norm.running_mean, net.norm.running_var]).numpy())
            last = rounds.state.stats.last
            found[name] = {
                "own": own,
                "after": after,
                "statistics differ": bool((statistics[0] != statistics[1]).any()),
                "count": int(net.count),
                "seen": bool(net.seen),
                "mask": net.mask.tolist(),
                "coordinates": last.coordinates,
                "sent": last.sent_bytes,
                "full": last.full_bytes,
                "rounds": rounds.state.step,
            }
    return found


def frozen():
    """A layer that is not trained does not travel; once it is, it does."""
    net = frozen_net()
    with in_rounds(net, period=2) as rounds:
        before = net[0].weight.detach().clone()
        Loop(net, rounds).run(2)
        alone, kept = rounds.state.stats.last.coordinates, bool((net[0].weight == before).all())
        net[0].requires_grad_(True)
        with torch.no_grad():
            net[0].weight += dist.get_rank()  # somebody set it, differently
        rounds.follow()
        Loop(net, rounds).run(2)
        return {
            "kept": kept,
            "coordinates": [alone, rounds.state.stats.last.coordinates],
            "values": flat(net).numpy(),
        }


def resumed():
    """Stop in the middle of a round and go on in fresh objects."""
    settings = {"period": 4, "error_feedback": True, "bits": 8, "levels": "float"} | DILOCO
    net = make_net()
    with in_rounds(net, **settings) as rounds:
        loop = Loop(net, rounds, torch.optim.Adam, lr=0.01).run(6)
        with rounds.agreed_values():
            agreed = copy.deepcopy(net.state_dict())
        saved = copy.deepcopy(
            {
                "rounds": rounds.state_dict(),
                "own": rounds.own_state(),
                "exchange": rounds.state.state_dict(),
                "optimizer": loop.optimizer.state_dict(),
            }
        )
        data = loop.data.get_state()
        whole = flat(loop.run(5).net).numpy()
    again = make_net()
    again.load_state_dict(agreed)
    rounds = LocalRounds(again, **(SMALL_UNITS | settings))
    rounds.state.load_state_dict(saved["exchange"])
    rounds.start(CPU)
    rounds.load_state_dict(saved["rounds"], saved["own"])
    loop = Loop(again, rounds, torch.optim.Adam, lr=0.01)
    loop.optimizer.load_state_dict(saved["optimizer"])
    loop.data.set_state(data)
    rest = flat(loop.run(5).net).numpy()
    rounds.end()
    return {
        "whole": whole,
        "resumed": rest,
        "agreed": torch.cat([v.flatten() for v in agreed.values()]).numpy(),
    }


def apart(rank):
    """Rank 2 has other settings."""
    found = {}
    for name, value in (("period", 5), ("outer_lr", 0.5), ("outer_momentum", 0.5), ("bits", 3)):
        rounds = LocalRounds(make_net(), **({name: value} if rank == 2 else {}))
        try:
            rounds.start(CPU)
            found[name] = "no error"
        except ValueError as error:
            found[name] = str(error)
        rounds.end()
    rounds = LocalRounds(nn.Linear(3, 3 + (rank == 2)))
    try:
        rounds.start(CPU)
    except ValueError as error:
        found["trained"] = str(error)
    return found


def local_rounds(rank):
    return {
        "by hand": by_hand(),
        "as ddp": as_ddp(),
        "lossy": lossy(),
        "frozen": frozen(),
        "resumed": resumed(),
        "apart": apart(rank),
    }


def lose_a_rank_between_rounds(rank, world_size, folder):
    """Rank 2 dies without a word in the middle of a round."""
    join(rank, world_size, folder, seconds=30)
    with in_rounds(make_net(), period=3) as rounds:
        loop = Loop(rounds.module, rounds).run(5)
        if rank == 2:
            os._exit(0)
        began = time.perf_counter()
        try:
            loop.run(1)
        except RuntimeError as error:
            return str(error), time.perf_counter() - began
        return "no error", time.perf_counter() - began
