"""Bodies of the multi-process tests of sharded training; spawned workers import them from here."""

from __future__ import annotations

import copy
import os
import time

import torch
import torch.distributed as dist

from exchange_jobs.sharded_bytes import sent
from exchange_jobs.sharded_training import (
    NETWORKS,
    SETTINGS,
    exchange,
    loss_of,
    make_transformer,
    mesh_of_replicas,
    native_mesh,
    own,
    shard,
    sharded,
    train,
    whole,
)
from exchange_jobs.sharded_values import (
    OF_RESNET,
    gathered,
    nan_of_one_rank,
    partly_used,
    unbiased,
    without_loss,
)
from exchange_jobs.training import join, leave, run_all
from lightning_n2uq.distributed.sharded import ShardedState

__all__ = ["NETWORKS", "OF_RESNET", "all_sharded_checks", "long_runs", "lose_a_rank_of_shards"]


def resumed_sharded(rank):
    """Four steps in one go, and with a new model, optimizer and state after two."""
    found = {}
    for way, where in (("shards", {}), ("replicas", mesh_of_replicas())):
        with exchange(param_bits=8) as state:
            net = sharded("transformer", state, **where)
            train(net, "transformer", steps=4, lr=0.1)
            straight = own(net)
        with exchange(param_bits=8) as state:
            net = sharded("transformer", state, **where)
            optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
            train_with(net, optimizer, range(2))
            saved = copy.deepcopy((net.state_dict(), optimizer.state_dict(), state.state_dict()))
        with exchange(param_bits=8) as state:
            net = sharded("transformer", state, **where)
            optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
            net.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
            state.load_state_dict(saved[2])
            train_with(net, optimizer, range(2, 4))
            found[way] = torch.equal(own(net), straight), state.step
    return found


def train_with(net, optimizer, steps):
    for step in steps:
        loss_of(net, "transformer", step).backward()
        optimizer.step()
        optimizer.zero_grad()


def different_replicas(rank):
    """Replicas that begin with other weights get those of the first, and stay equal to the bit."""
    where = mesh_of_replicas()
    net = make_transformer()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(rank // 2)
    net = shard(net, where["mesh"])
    with exchange(param_bits=8) as state:
        state.attach(net, where["replicas"])
        train(net, "transformer", steps=3)
    mine = whole(net)
    first = mine.clone()
    dist.broadcast(first, 0)
    return torch.equal(first, mine) and bool(mine.mean() < 0.5)


def refused(rank):
    """Messages about what cannot work."""
    calls = {
        "unsharded": lambda: ShardedState().attach(make_transformer()),
        "replicas in the mesh": lambda: ShardedState().attach(shard(make_transformer(), native_mesh())),
        "too few replicas": lambda: ShardedState().attach(
            shard(make_transformer(), mesh_of_replicas()["mesh"]), replicas=[dist.get_rank()]
        ),
        "pattern": lambda: ShardedState(skip_patterns=("nothing*",)).attach(sharded("transformer")),
        "second phase": lambda: ShardedState(second_phase_bits=8).attach(sharded("transformer")),
        "divide factor": divide_by_three,
        "disagreement": lambda: ShardedState(bits=3 if rank == 2 else 4).attach(sharded("transformer")),
    }
    return {name: message_of(call) for name, call in calls.items()}


def message_of(call):
    try:
        call()
    except ValueError as error:
        return str(error)
    return "no error"


def divide_by_three():
    with exchange() as state:
        net = sharded("transformer", state)
        for part in (net, *net.blocks):
            part.set_gradient_divide_factor(3.0)
        loss_of(net, "transformer", 0).backward()


def all_sharded_checks(rank, world_size, folder):
    join(rank, world_size, folder)
    checks = (
        without_loss,
        unbiased,
        gathered,
        sent,
        partly_used,
        resumed_sharded,
        nan_of_one_rank,
        different_replicas,
        refused,
    )
    return run_all(checks, rank)


def lose_a_rank_of_shards(rank, world_size, folder):
    """Rank 2 dies without a word while the others wait for it."""
    join(rank, world_size, folder, seconds=60)
    state = ShardedState(**SETTINGS)
    net = sharded("transformer", state)
    loss_of(net, "transformer", 0).backward()
    if rank == 2:
        os._exit(0)
    began = time.perf_counter()
    try:
        loss_of(net, "transformer", 1).backward()
    except RuntimeError as error:
        return str(error), time.perf_counter() - began
    return "no error", time.perf_counter() - began


def long_runs(rank, world_size, folder, steps=200):
    """Losses on new data after 200 steps, the learning rate falling to zero; twice by FSDP2 alone."""
    join(rank, world_size, folder, seconds=300)
    found = {}
    for name in NETWORKS:
        for way, settings, where in (
            ("plain", None, {}),
            ("plain, other batches", None, {}),
            ("4 bits", {}, {}),
            ("4 bits, parameters 8", {"param_bits": 8}, {}),
            ("replicas, parameters 8", {"param_bits": 8}, mesh_of_replicas()),
        ):
            with exchange(**(settings or {})) as state:
                net = sharded(name, None if settings is None else state, **where)
                train(net, name, steps=steps, first=500 * ("other" in way), lr=0.05, decay=True)
            with torch.no_grad():
                net.eval()
                losses = torch.stack([loss_of(net, name, 1000 + step) for step in range(20)]).mean()
            dist.all_reduce(losses)
            found[f"{name}, {way}"] = float(losses) / world_size
    leave()
    return found
