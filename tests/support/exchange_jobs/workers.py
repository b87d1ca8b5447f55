"""Bodies of the multi-process tests; spawned workers import them from here."""

from __future__ import annotations

import contextlib
import copy
import os
import pickle
import random
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_n2uq.compression import IdentityCodec
from lightning_n2uq.distributed.ordered import ordered_hook
from lightning_n2uq.strategies import NUQSGDState, nuqsgd_hook
from lightning_n2uq.strategies.torch_hooks import powersgd_state

TINY_BUCKETS = 0.01  # MiB: about one layer per DDP bucket
SMALL_UNITS = {"bucket_size": 256, "unit_numel": 4096, "min_numel": 64}


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


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(32, 96), nn.ReLU(), nn.BatchNorm1d(96), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 10)
    )


def flat(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def agree(values, group=None):
    """Whether the values are the same bits on all ranks."""
    everyone = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, values.contiguous(), group=group)
    return all(torch.equal(other, values) for other in everyone)


def train(
    state, hook=nuqsgd_hook, steps=5, accumulate=1, uneven=False, net=None, lr=0.1, skip=0, **ddp_arguments
):
    """Train on this rank's own data and return the flat parameters."""
    rank = dist.get_rank()
    net = make_net() if net is None else net
    model = DistributedDataParallel(net, **ddp_arguments)
    if state is not None:
        model.register_comm_hook(state, hook)
    data = torch.Generator().manual_seed(rank)
    delays = random.Random(rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for _ in range(skip):  # batches that an earlier part of the run has seen
        torch.randn(8, 32, generator=data), torch.randint(10, (8,), generator=data)
    for _ in range(steps):
        optimizer.zero_grad()
        for micro in range(accumulate):
            x = torch.randn(8, 32, generator=data).to(next(net.parameters()).dtype)
            y = torch.randint(10, (8,), generator=data)
            if uneven:
                time.sleep(delays.random() * 0.02)
            quiet = model.no_sync() if micro < accumulate - 1 else contextlib.nullcontext()
            with quiet:
                nn.functional.cross_entropy(model(x).float(), y).backward()
        optimizer.step()
    return flat(net)


@contextlib.contextmanager
def exchange(**settings):
    state = NUQSGDState(**(SMALL_UNITS | settings))
    try:
        yield state
    finally:
        state.close()


def replicas(rank):
    """Long runs of both schemes, with and without accumulation and error feedback."""
    found = {}
    for scheme, accumulate, feedback, steps in (
        ("two_phase", 1, False, 200),
        ("two_phase", 2, True, 200),
        ("all_gather", 1, True, 200),
        ("all_gather", 2, False, 200),
    ):
        with exchange(scheme=scheme, error_feedback=feedback, unit_numel=1 << 20) as state:
            values = train(state, steps=steps, accumulate=accumulate)
            found[f"{scheme}, accumulate {accumulate}"] = agree(values) and state.step == steps
    return found


def plain_ddp(rank):
    """Identity codec against plain DDP: on two ranks bit by bit, since two numbers have one sum."""
    pair = [dist.new_group(members) for members in ([0, 1], [2, 3])][rank // 2]
    found = {"four": float((train(None) - train_with(codec=IdentityCodec())).abs().max())}
    reference = train(None, process_group=pair, steps=20, bucket_cap_mb=TINY_BUCKETS)
    for scheme in ("two_phase", "all_gather"):
        values = train_with(
            codec=IdentityCodec(), scheme=scheme, process_group=pair, steps=20, bucket_cap_mb=TINY_BUCKETS
        )
        found[scheme] = torch.equal(values, reference)
    return found


def train_with(steps=5, uneven=False, bucket_cap_mb=None, ddp=None, net=None, lr=0.1, **settings):
    arguments = dict(ddp or {}) | ({"bucket_cap_mb": bucket_cap_mb} if bucket_cap_mb else {})
    if "process_group" in settings:
        arguments["process_group"] = settings["process_group"]
    with exchange(**settings) as state:
        return train(state, steps=steps, uneven=uneven, net=net, lr=lr, **arguments)


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
        found[name] = agree(train_with(steps=8, uneven=True, bucket_cap_mb=TINY_BUCKETS, **settings))
    state = powersgd_state(rank=1, start=2)
    values = train(state, ordered_hook, steps=8, uneven=True, bucket_cap_mb=TINY_BUCKETS)
    found["powersgd"] = agree(values)
    state.close()
    return found


def ddp_modes(rank):
    """DDP's own switches, half precision and compiled modules."""
    found = {}
    for name, arguments in {
        "find_unused_parameters": {"find_unused_parameters": True},
        "static_graph": {"static_graph": True},
        "gradient_as_bucket_view": {"gradient_as_bucket_view": True},
    }.items():
        found[name] = agree(train_with(ddp=arguments))
    for dtype in (torch.bfloat16, torch.float16):
        values = train_with(net=make_net().to(dtype), lr=0.01)
        found[str(dtype)] = agree(values.float()) and bool(torch.isfinite(values).all())
    found["compiled"] = agree(train_with(net=torch.compile(make_net(), backend="aot_eager")))
    alone = [dist.new_group([member]) for member in range(dist.get_world_size())][rank]
    with exchange(process_group=alone) as state:
        values = train(state, process_group=alone)
        found["alone"] = torch.equal(values, train(None, process_group=alone)) and state.stats is None
    return found


def counters(rank):
    """What is counted, and which buffers are used, over steps."""
    with exchange() as state:
        model = DistributedDataParallel(make_net())
        model.register_comm_hook(state, nuqsgd_hook)
        places = []
        for _step in range(4):
            model(torch.randn(4, 32)).sum().backward()
            state.stats.watch, state.stats.measure_every = True, 1
            plans = state._engine.plans.values()
            legs = [leg for plan in plans for chain in plan.chains for leg in chain.legs]
            places.append([leg.recv.data_ptr() for leg in legs])
        last = state.stats.last
        return {
            "reused": places[-1] == places[-2],
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
        seen = bool(torch.isnan(net.weight.grad).all()) and state.stats.last.nonfinite == 16
        scaler.step(optimizer)
        scaler.update()
        owed = torch.stack([leg["parameter0"] for leg in state.state_dict()["owed"]["legs"]])
        return {
            "nan": seen,
            "skipped": torch.equal(before, flat(net)) and scaler.get_scale() == 2.0,
            "residual": bool(torch.isfinite(owed).all()) and bool(owed.any()),
        }


def saved_state(rank):
    """Residuals survive pickling, and a rebuilt layout: the mean over ranks of what is owed stays."""
    net = make_net()
    with exchange(error_feedback=True, module=net) as state:
        train(state, net=net, steps=3)
        saved = state.state_dict()
        twin = pickle.loads(pickle.dumps(state))
        legs, again = saved["owed"]["legs"], twin.state_dict()["owed"]["legs"]
        same = all(torch.equal(a[k], b[k]) for a, b in zip(legs, again, strict=True) for k in a)
        twin.bind(net)
        train(twin, net=copy.deepcopy(net), steps=2, bucket_cap_mb=TINY_BUCKETS)
        twin.close()
        return {"same": same, "names": sorted(legs[0]), "steps": (saved["step"], twin.step)}


def resumed(rank):
    """Stop after three steps, go on in a new DDP module and state; compare with five steps without a stop."""
    found = {}
    feedback = {"error_feedback": True, "bits": 8, "levels": "float"}
    for name, settings in {
        "without feedback": {},
        "two_phase": feedback,
        "all_gather": feedback | {"scheme": "all_gather"},
        "hierarchical": feedback | {"hierarchical": True, "ranks_per_node": 2},
    }.items():
        whole = train_with(net=make_net(), bucket_cap_mb=TINY_BUCKETS, **settings)
        net = make_net()
        with exchange(module=net, **settings) as first:
            train(first, net=net, steps=3, bucket_cap_mb=TINY_BUCKETS)
            saved = first.state_dict()
        with exchange(module=net, **settings) as second:
            second.load_state_dict(saved)
            found[name] = torch.equal(
                whole, train(second, net=net, steps=2, skip=3, bucket_cap_mb=TINY_BUCKETS)
            )
    with exchange(module=net, **(feedback | {"bucket_size": 512})) as other:  # the saved places do not fit
        other.load_state_dict(saved)
        found["other settings"] = agree(train(other, net=net, steps=2, bucket_cap_mb=TINY_BUCKETS))
    return found


def all_checks(rank, world_size, folder):
    join(rank, world_size, folder)
    checks = (
        replicas,
        plain_ddp,
        many_buckets,
        ddp_modes,
        counters,
        disagreement,
        nonfinite,
        saved_state,
        resumed,
    )
    found = {}
    for check in checks:
        began = time.perf_counter()
        found[check.__name__] = check(rank)
        found[check.__name__]["seconds taken"] = time.perf_counter() - began
    dist.barrier()
    dist.destroy_process_group()
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
