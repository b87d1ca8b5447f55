"""Gradients and parameters of sharded training beside those of FSDP2 alone: exact, unbiased, not hidden."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from exchange_jobs.sharded_training import (
    NETWORKS,
    exchange,
    loss_of,
    mesh_of_replicas,
    own,
    sharded,
    train,
    whole,
)
from lightning_n2uq.compression import IdentityCodec
from lightning_n2uq.distributed.sharded import CompressedAllGather

BF16 = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)}
WAYS = {
    "plain": ({}, {}),
    "accumulated and clipped": ({"micro": 2, "clip": 0.05}, {}),
    "bf16": ({}, BF16),
    "warm-up": ({}, {}),
}
OF_RESNET = ("plain", "accumulated and clipped")  # torch's batch norm on the CPU takes no weights in bf16


def close_to(found, expected):
    """The relative distance of two flat tensors."""
    return float((found - expected).norm() / expected.norm())


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


def nan_of_one_rank(rank):
    """A NaN in the loss of rank 1 reaches the gradients of all."""
    with exchange() as state:
        net = sharded("transformer", state)
        state.stats.watch = True
        loss = loss_of(net, "transformer", 0) * (float("nan") if rank == 1 else 1.0)
        loss.backward()
        shards = [p.grad.to_local() for p in net.parameters() if p.dim() > 1]
        return {"nan": all(bool(shard.isnan().any()) for shard in shards), "bad": state.stats.last.nonfinite}
