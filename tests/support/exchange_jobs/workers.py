"""Bodies of the multi-process tests; spawned workers import them from here."""

from __future__ import annotations

import copy
import os
import pickle
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from exchange_jobs.rounds import local_rounds
from exchange_jobs.simulated import real_steps
from exchange_jobs.training import (
    SMALL_UNITS,
    TINY_BUCKETS,
    exchange,
    flat,
    join,
    leave,
    make_net,
    run_all,
    train,
    train_with,
)
from exchange_jobs.values import later_values, values
from lightning_n2uq.strategies import NUQSGDState, nuqsgd_hook
from lightning_n2uq.strategies.torch_hooks import ordered_hook, powersgd_state
from lightning_n2uq.utils import compat


def replicas(rank, steps=20):
    """Runs of both schemes, with and without accumulation and error feedback."""
    found = {}
    for scheme, accumulate, feedback in (
        ("two_phase", 1, False),
        ("two_phase", 2, True),
        ("all_gather", 1, True),
        ("all_gather", 2, False),
    ):
        with exchange(scheme=scheme, error_feedback=feedback, unit_numel=1 << 20) as state:
            values = train(state, steps=steps, accumulate=accumulate)
            found[f"{scheme}, accumulate {accumulate}"] = {"parameters": values.numpy(), "steps": state.step}
    return found


def many_buckets(rank):
    """Tiny DDP buckets on ranks that are randomly late."""
    found = {}
    for name, settings in {
        "two_phase": {},
        "all_gather": {"scheme": "all_gather"},
        "huffman": {"coding": "huffman"},
        "hierarchical": {"hierarchical": True, "ranks_per_node": 2},
        "warm-up": {"warmup_steps": 3, "error_feedback": True},
        "second": {"bits": 2, "second_phase_bits": 8},
    }.items():
        found[name] = train_with(steps=8, uneven=True, bucket_cap_mb=TINY_BUCKETS, **settings).numpy()
    state = powersgd_state(rank=1, start=2)
    values = train(state, ordered_hook, steps=8, uneven=True, bucket_cap_mb=TINY_BUCKETS)
    found["powersgd"] = values.numpy()
    state.close()
    return found


def alone(rank):
    """A group of one rank has nobody to exchange with."""
    group = [dist.new_group([member]) for member in range(dist.get_world_size())][rank]
    with exchange(process_group=group) as state:
        values = train(state, process_group=group)
        return {
            "exchange": values.numpy(),
            "ddp": train(None, process_group=group).numpy(),
            "connected": state.stats is not None,
        }


def counters(rank):
    """What is counted, and which buffers are used, over steps."""
    with exchange() as state:
        model = DistributedDataParallel(make_net())
        model.register_comm_hook(state, nuqsgd_hook)
        places = []
        for _step in range(4):
            model(torch.randn(4, 32)).sum().backward()
            state.stats.watch, state.stats.measure_every = True, 1
            plans = state._exchange.plans.values()
            phases = [phase for plan in plans for unit in plan.units for phase in unit.phases]
            places.append([phase.recv.data_ptr() for phase in phases])
        last = state.stats.last
        return {
            "places": places[-2:],
            "ratio": last.full_bytes / last.sent_bytes,
            "error": last.relative_error,
            "seconds": min(last.encode_s, last.decode_s, last.exchange_s, last.sync_s),
            "coordinates": last.coordinates,
            "step": last.step,
        }


def disagreement(rank):
    """Rank 2 has other settings."""
    found = {}
    for name, value in (("bits", 3), ("bucket_size", 512), ("scheme", "all_gather"), ("levels", "uniform")):
        with exchange(**({name: value} if rank == 2 else {})) as state:
            try:
                state.connect(torch.device("cpu"))
                found[name] = "no error"
            except ValueError as error:
                found[name] = str(error)
    return found


def nonfinite(rank):
    """A NaN on rank 1 only, with error feedback and a loss scaler."""
    with exchange(error_feedback=True, bits=8, levels="float") as state:
        net = nn.Linear(64, 64, bias=False)
        model = DistributedDataParallel(net)
        model.register_comm_hook(state, nuqsgd_hook)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale(model(torch.randn(4, 64)).sum()).backward()
        before = flat(net).clone()
        state.stats.watch = True
        optimizer.zero_grad()
        x = torch.randn(4, 64)
        x[0, 0] = float("nan") if rank == 1 else 0.0  # poisons the first column, so every norm
        scaler.scale(model(x).square().mean()).backward()
        seen = net.weight.grad.clone().numpy(), state.stats.last.nonfinite
        scaler.step(optimizer)
        scaler.update()
        owed = torch.stack([leg["parameter0"] for leg in state.state_dict()["owed"]["legs"]])
        return {
            "gradient": seen[0],
            "bad buckets": seen[1],
            "parameters": (before.numpy(), flat(net).numpy()),
            "scale": scaler.get_scale(),
            "residual": owed.numpy(),
        }


def saved_state(rank):
    """Residuals survive pickling, and a rebuilt layout: the mean over ranks of what is owed stays."""
    net = make_net()
    with exchange(error_feedback=True, module=net) as state:
        train(state, net=net, steps=3)
        saved = state.state_dict()
        twin = pickle.loads(pickle.dumps(state))
        legs, again = saved["owed"]["legs"], twin.state_dict()["owed"]["legs"]
        pairs = [(a[k].numpy(), b[k].numpy()) for a, b in zip(legs, again, strict=True) for k in a]
        twin.bind(net)
        train(twin, net=copy.deepcopy(net), steps=2, bucket_cap_mb=TINY_BUCKETS)
        twin.close()
        return {"residuals": pairs, "names": sorted(legs[0]), "steps": (saved["step"], twin.step)}


def resumed(rank):
    """Stop after three steps, go on in a new DDP module and state; compare with five steps without a stop."""
    found = {}
    feedback = {"error_feedback": True, "bits": 8, "levels": "float"}
    for name, settings in {
        "without feedback": {},
        "two_phase": feedback,
        "all_gather": feedback | {"scheme": "all_gather"},
        "hierarchical": feedback | {"hierarchical": True, "ranks_per_node": 2},
        "adapted levels": {"method": "alq", "adapt_every": 2, "warmup_steps": 1},
        "rotated": feedback | {"bits": 2, "levels": None, "rotation": "hadamard", "rounding": "eden"},
    }.items():
        whole = train_with(net=make_net(), bucket_cap_mb=TINY_BUCKETS, **settings)
        net = make_net()
        with exchange(module=net, **settings) as first:
            train(first, net=net, steps=3, bucket_cap_mb=TINY_BUCKETS)
            saved = first.state_dict()
        with exchange(module=net, **settings) as second:
            second.load_state_dict(saved)
            rest = train(second, net=net, steps=2, skip=3, bucket_cap_mb=TINY_BUCKETS)
            found[name] = (whole.numpy(), rest.numpy())
    found["saved one step after a resume"] = resumed_twice(feedback)
    with exchange(module=net, **(feedback | {"bucket_size": 512})) as other:  # the saved places do not fit
        other.load_state_dict(saved)
        found["other settings"] = train(other, net=net, steps=2, bucket_cap_mb=TINY_BUCKETS).numpy()
    return found


def resumed_twice(settings):
    """Save one step after a resume as the strategy does, which rebuilds the buckets; go on for one step."""
    whole = train_with(net=make_net(), bucket_cap_mb=TINY_BUCKETS, **settings)
    net, saved = make_net(), None
    for done, steps in ((0, 3), (3, 1), (4, 1)):
        with exchange(module=net, **settings) as state:
            if saved is not None:
                state.load_state_dict(saved)

            def save(model, state=state):
                buckets = compat.rebuild_buckets(model)
                if buckets is not None:
                    state.rebuilt(buckets)

            rest = train(state, net=net, steps=steps, skip=done, bucket_cap_mb=TINY_BUCKETS, finish=save)
            saved = state.state_dict()
    return whole.numpy(), rest.numpy()


def all_checks(rank, world_size, folder):
    join(rank, world_size, folder)
    checks = (
        replicas,
        many_buckets,
        alone,
        counters,
        disagreement,
        nonfinite,
        saved_state,
        resumed,
        local_rounds,
        real_steps,
        values,  # last: see there
    )
    return run_all(checks, rank)


def combinations(rank, world_size, folder):
    """Modes of the exchange that combine what `all_checks` shows apart."""
    join(rank, world_size, folder)
    return run_all((later_values,), rank)


def long_replicas(rank, world_size, folder):
    """Runs so long that what happens once in many steps happens."""
    join(rank, world_size, folder)
    found = replicas(rank, steps=200)
    leave()
    return found


def lose_a_rank(rank, world_size, folder):
    """Rank 2 dies without a word while the others wait for its gradients."""
    join(rank, world_size, folder, seconds=30)
    state = NUQSGDState(**SMALL_UNITS)
    model = DistributedDataParallel(nn.Linear(64, 64))
    model.register_comm_hook(state, nuqsgd_hook)
    for _ in range(3):  # DDP's own collective about its buckets is behind us
        model(torch.randn(4, 64)).sum().backward()
    if rank == 2:
        os._exit(0)
    began = time.perf_counter()
    try:
        model(torch.randn(4, 64)).sum().backward()
    except RuntimeError as error:
        return str(error), time.perf_counter() - began
    return "no error", time.perf_counter() - began
