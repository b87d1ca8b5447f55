"""Small networks, sharded, and their training; by FSDP2 alone or with compressed collectives."""

from __future__ import annotations

import contextlib

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from lightning_n2uq.distributed.sharded import ShardedState

SETTINGS = {"bucket_size": 256, "min_numel": 64}
TOKENS, WIDTH = 32, 64


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(WIDTH), nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 128), nn.GELU(), nn.Linear(128, WIDTH))

    def forward(self, x):
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(x)


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(TOKENS, WIDTH)
        self.blocks = nn.ModuleList([Block()])
        self.head = nn.Linear(WIDTH, TOKENS)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x).clone()  # FSDP2 warns of views


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1, self.norm1 = (
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.conv2, self.norm2 = (
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x):
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(x + self.norm2(self.conv2(y)))


def make_transformer():
    torch.manual_seed(0)
    return Transformer()


def make_resnet():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), Residual(32), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


NETWORKS = {"transformer": make_transformer, "resnet": make_resnet}


def batch(name, step, micro=0):
    """This rank's inputs and targets, which follow from the inputs but for a fifth that are any."""
    generator = torch.Generator().manual_seed(1000 * step + 10 * micro + dist.get_rank())
    if name == "transformer":
        x = torch.randint(TOKENS, (8, 12), generator=generator)
        y, targets = (3 * x + 1) % TOKENS, TOKENS
    else:
        y, targets = torch.randint(10, (8,), generator=generator), 10
        shown = torch.randn(10, 3, 8, 8, generator=torch.Generator().manual_seed(7))
        x = shown[y] + torch.randn(8, 3, 8, 8, generator=generator)
    noise = torch.rand(y.shape, generator=generator) < 0.2
    return x, torch.where(noise, torch.randint(targets, y.shape, generator=generator), y)


def loss_of(net, name, step, micro=0):
    x, y = batch(name, step, micro)
    return F.cross_entropy(net(x).flatten(0, -2).float(), y.flatten())


def shard(net, mesh, **options):
    for part in net.modules():
        if isinstance(part, Block | Residual):
            fully_shard(part, mesh=mesh, **options)
    return fully_shard(net, mesh=mesh, **options)


def sharded(name, state=None, replicas=None, mesh=None, **options):
    net = shard(
        NETWORKS[name](),
        mesh or dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),)),
        **options,
    )
    if state is not None:
        state.attach(net, replicas)
    return net


def mesh_of_replicas():
    """Two replicas of two shards: the mesh of the shards, and the ranks with this rank's shard."""
    mesh = native_mesh()
    return {"mesh": mesh["shards"], "replicas": dist.get_process_group_ranks(mesh.get_group("replicas"))}


def native_mesh():
    """The mesh with which FSDP2 averages over replicas itself."""
    return dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))


@contextlib.contextmanager
def exchange(**settings):
    state = ShardedState(**(SETTINGS | settings))
    try:
        yield state
    finally:
        state.close()


def own(net):
    """This rank's shards of all parameters."""
    return torch.cat([p.to_local().detach().flatten() for p in net.parameters()])


def whole(net):
    """All parameters, unsharded."""
    return torch.cat([p.full_tensor().detach().flatten() for p in net.parameters()])


def train(net, name, steps=2, first=0, lr=0.1, micro=1, clip=None, decay=False):
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps if decay else 1.0)
    loss = torch.zeros(())
    for step in range(first, first + steps):
        for part in range(micro):
            net.set_requires_gradient_sync(part == micro - 1)
            loss = loss_of(net, name, step, part) / micro
            loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return float(loss.detach())
