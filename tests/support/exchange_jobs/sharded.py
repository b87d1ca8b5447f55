"""Bodies of the multi-process tests of sharded training; spawned workers import them from here."""

from __future__ import annotations

import contextlib
import copy
import os
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from exchange_jobs.sharded_training import (
    NETWORKS,
    SETTINGS,
    exchange,
    loss_of,
    make_transformer,
    own,
    shard,
    sharded,
    train,
    whole,
)
from exchange_jobs.training import join
from lightning_n2uq.compression import IdentityCodec
from lightning_n2uq.distributed.sharded import CompressedAllGather, ShardedState


def close_to(found, expected):
    """The relative distance of two flat tensors."""
    return float((found - expected).norm() / expected.norm())


def mesh_of_replicas():
    """Two replicas of two shards: the mesh of the shards, and the ranks with this rank's shard."""
    mesh = native_mesh()
    return {"mesh": mesh["shards"], "replicas": dist.get_process_group_ranks(mesh.get_group("replicas"))}


def native_mesh():
    """The mesh with which FSDP2 averages over replicas itself."""
    return dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))


BF16 = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)}
WAYS = {
    "plain": ({}, {}),
    "accumulated and clipped": ({"micro": 2, "clip": 0.05}, {}),
    "bf16": ({}, BF16),
    "warm-up": ({}, {}),
}
OF_RESNET = ("plain", "accumulated and clipped")  # torch's batch norm on the CPU takes no weights in bf16


def without_loss(rank):
    """Distances of parameters after some steps from those of FSDP2 without us."""
    found = {}
    for name in NETWORKS:
        for way, (training, options) in WAYS.items():
            if name == "resnet" and way not in OF_RESNET:
                continue
            plain = sharded(name, **options)
            train(plain, name, **training)
            settings = (
                {"warmup_steps": 9, "param_bits": 8} if way == "warm-up" else {"codec": IdentityCodec()}
            )
            with exchange(**settings) as state:
                net = sharded(name, state, **options)
                train(net, name, **training)
                found[f"{name}, {way}"] = close_to(own(net), own(plain))
            if way == "plain":
                with exchange(codec=IdentityCodec()) as state:
                    net = sharded(name, state, **mesh_of_replicas())
                    train(net, name)
                    found[f"{name}, replicas"] = close_to(whole(net), whole(plain))
    return found


def gradient(net, name):
    net.zero_grad()
    loss_of(net, name, 0).backward()
    return {key: p.grad.to_local().clone() for key, p in net.named_parameters() if p.to_local().numel()}


def bias(draws, exact):
    """How far the squared distance of the mean from the exact value is from expected, in standard errors."""
    mean, variance = draws.double().mean(dim=0), draws.double().var(dim=0) / len(draws)
    return float(((mean - exact).square() - variance).sum() / (2 * variance.square().sum()).sqrt())


def unbiased(rank, draws=50):
    """Gradients of one batch in 4 bits, again and again; 1-D ones travel in full precision."""
    found = {}
    for name, way in (("transformer", "shards"), ("resnet", "shards"), ("transformer", "replicas")):
        where = mesh_of_replicas() if way == "replicas" else {}
        with exchange(codec=IdentityCodec()) as state:
            expected = gradient(sharded(name, state, **where), name)
        with exchange() as state:
            net = sharded(name, state, **where)
            seen = [gradient(net, name) for _ in range(draws)]
        wide, small = (
            [key for key in expected if (expected[key].dim() > 1) == is_wide] for is_wide in (True, False)
        )
        draws_of = torch.stack([flat(one, wide) for one in seen])
        exact = flat(expected, wide)
        found[f"{name}, {way}"] = {
            "bias": bias(draws_of, exact),
            "error": float((draws_of - exact).square().sum() / draws / exact.square().sum()),
            "1-D": max(close_to(flat(one, small), flat(expected, small)) for one in seen),
        }
    found["rotated"] = rotated_error()
    return found


def rotated_error():
    """The relative squared error of gradients in 2 bits behind a random rotation, 1-D ones left out."""
    with exchange(codec=IdentityCodec()) as state:
        expected = gradient(sharded("transformer", state), "transformer")
    with exchange(rotation="hadamard", rounding="eden", bits=2) as state:
        seen = gradient(sharded("transformer", state), "transformer")
    wide = sorted(key for key in expected if expected[key].dim() > 1)
    return close_to(flat(seen, wide), flat(expected, wide)) ** 2


def flat(gradients, keys):
    return torch.cat([gradients[key].flatten() for key in keys])


class Recorder:
    """Keeps what a gather returns, by step and tensor."""

    def __init__(self, gather, state):
        self.gather, self.state, self.seen = gather, state, []

    def allocate(self, *args, **kwargs):
        return self.gather.allocate(*args, **kwargs)

    def __call__(self, output_tensor, input_tensor, group, async_op=False):
        source = output_tensor.clone()
        source.view(group.size(), -1)[group.rank()] = input_tensor
        self.gather(output_tensor, input_tensor, group, async_op)
        self.seen.append((self.state.step, output_tensor.clone()))


def gathered(rank, steps=16):
    """Weights of one linear layer gathered in 8 bits, in the forward and in the backward pass."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(40, 64))
    exact = net[0].weight.detach().clone()
    fully_shard(net[0])
    fully_shard(net)
    with exchange(param_bits=8) as state:
        state.attach(net)
        recorder = Recorder(CompressedAllGather(state), state)
        net[0].set_custom_all_gather(recorder)
        for _ in range(steps):
            net(torch.randn(4, 40)).square().sum().backward()
        net.eval()
        with torch.no_grad():
            net(torch.randn(4, 40))
    evaluated = recorder.seen.pop()[1].view(4, -1)[:, : 16 * 40].reshape(64, 40)
    by_step = [[t for step, t in recorder.seen if step == wanted] for wanted in range(steps)]
    weights = [pair[0].view(4, -1)[:, : 16 * 40].reshape(64, 40) for pair in by_step]
    everywhere = weights[0].clone()
    dist.broadcast(everywhere, 0)
    return {
        "calls": {len(pair) for pair in by_step},
        "forward and backward": all(torch.equal(*pair) for pair in by_step),
        "evaluation": torch.equal(evaluated, exact),
        "ranks": torch.equal(everywhere, weights[0]),
        "bias": bias(torch.stack(weights), exact),
        "error": close_to(weights[0], exact) ** 2,
    }


OLD_NAMES = {"reduce_scatter": "reduce_scatter_tensor", "all_gather": "all_gather_into_tensor"}


def bytes_of(kind, group, tensors):
    """Bytes that a rank sends in a collective; the smaller tensor is one rank's part."""
    ranks, part = dist.get_world_size(group), min(tensors, key=torch.numel)
    size = part.numel() * part.element_size() * (ranks - 1)
    return 2 * size / ranks if kind == "all_reduce" else size


@contextlib.contextmanager
def counted():
    """Counts the bytes that this rank sends to others in collectives that FSDP2 itself starts."""
    names = {kind: f"{kind}_single" for kind in OLD_NAMES} | {"all_reduce": "all_reduce"}
    if not hasattr(dist, "all_gather_single"):  # before torch 2.14
        names.update(OLD_NAMES)
    found, kept = dict.fromkeys(names, 0.0), {name: getattr(dist, name) for name in names.values()}

    def watch(kind, function):
        def call(*args, group=None, **kwargs):
            tensors = [value for value in (*args, *kwargs.values()) if torch.is_tensor(value)]
            found[kind] += bytes_of(kind, group, tensors)
            return function(*args, group=group, **kwargs)

        return call

    for kind, name in names.items():
        setattr(dist, name, watch(kind, kept[name]))
    try:
        yield found
    finally:
        for name, function in kept.items():
            setattr(dist, name, function)


def sent(rank):
    """Bytes of one step: of FSDP2 alone by collective, and as the state counts them."""
    found = {}
    replicas = mesh_of_replicas()
    native = native_mesh()
    for name in NETWORKS:
        for way, plain_mesh, where, settings in (
            ("4 bits", None, {}, {}),
            ("4 bits, parameters 8", None, {}, {"param_bits": 8}),
            ("replicas", native, replicas, {}),
            ("replicas, parameters 8", native, replicas, {"param_bits": 8}),
        ):
            plain = sharded(name, mesh=plain_mesh)
            with counted() as counts:
                train(plain, name, steps=1)
            with exchange(**settings) as state:
                train(sharded(name, state, **where), name, steps=2)
                last = state.stats.last
            found[f"{name}, {way}"] = {
                "plain": dict(counts), "sent": last.sent_bytes, "full": last.full_bytes, "step": last.step,
                "seconds": min(last.encode_s, last.decode_s, last.exchange_s),
            }  # fmt: skip
    return found


class Partly(nn.Module):
    """The second layer gets no gradient, the third is frozen, the last two change places by the step."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(5))
        self.layers[2].requires_grad_(False)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.layers[3 + self.calls % 2](self.layers[2](self.layers[0](x)))


def partly_used(rank):
    """Distances of gradients from FSDP2's, by name, where some parameters are unused and one is frozen."""
    found, nets = [], [Partly(), Partly()]
    for net in nets:
        fully_shard(net)
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(rank))
    with exchange(skip_patterns=("layers.4.weight",)) as state:
        state.attach(nets[1])
        for _ in range(2):
            for net in nets:
                net.zero_grad()
                net(x).square().mean().backward()
            plain, ours = (
                {k: p.grad.full_tensor() for k, p in net.named_parameters() if p.grad is not None}
                for net in nets
            )
            found.append({key: close_to(ours.pop(key), plain[key]) for key in plain})
            assert not ours, ours.keys()
    return found


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


def nan_of_one_rank(rank):
    """A NaN in the loss of rank 1 reaches the gradients of all."""
    with exchange() as state:
        net = sharded("transformer", state)
        state.stats.watch = True
        loss = loss_of(net, "transformer", 0) * (float("nan") if rank == 1 else 1.0)
        loss.backward()
        shards = [p.grad.to_local() for p in net.parameters() if p.dim() > 1]
        return {"nan": all(bool(shard.isnan().any()) for shard in shards), "bad": state.stats.last.nonfinite}


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
    found, taken = {}, {}
    for check in checks:
        began = time.perf_counter()
        found[check.__name__] = check(rank)
        taken[check.__name__] = time.perf_counter() - began
    dist.barrier()
    dist.destroy_process_group()
    return found | {"seconds": taken}


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
    dist.barrier()
    dist.destroy_process_group()
    return found
