"""A few steps of a network whose gradients real ranks exchange, for a simulation to repeat.

DDP's first step uses another layout of its buckets than all later ones, so its gradients are zero here.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_n2uq.distributed import NUQSGDState, nuqsgd_hook

RANKS, STEPS = 4, 4
SMALL = {"bucket_size": 256, "unit_numel": 2048, "min_numel": 64}
ROTATED = {"rotation": "hadamard", "bits": 2, "rounding": "eden"}
MODES = {
    "4 bits": {},
    "2 bits of QSGD": {"bits": 2, "levels": "uniform", "norm": "linf"},
    "all-gather": {"scheme": "all_gather"},
    "Huffman": {"coding": "huffman"},
    "nodes": {"hierarchical": True, "ranks_per_node": 2},
    "rotated": ROTATED,
    "residuals": ROTATED | {"error_feedback": True},
    "ALQ": {"method": "alq", "adapt_every": 2},
    "top-k": {"method": "topk", "error_feedback": True},
    "warm-up": {"warmup_steps": 2, "bits": 8, "levels": "float"},
    "another seed": {"seed": 7},
}


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 96), nn.ReLU(), nn.Linear(96, 50), nn.ReLU(), nn.Linear(50, 4))


def batch(rank, step):
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(8, 16, generator=generator), torch.randint(4, (8,), generator=generator)


def loss_of(net, rank, step):
    images, labels = batch(rank, step)
    loss = nn.functional.cross_entropy(net(images), labels)
    return loss if step else loss * 0


def update(parameters, means):
    with torch.no_grad():
        for parameter, mean in zip(parameters, means, strict=True):
            parameter -= 0.1 * mean


def real_steps(rank):
    """The weights after every step, and the bytes that the last one sent, by mode."""
    found = {}
    for name, settings in MODES.items():
        net = make_net()
        ddp = DistributedDataParallel(net)
        state = NUQSGDState(module=net, **(SMALL | settings))
        ddp.register_comm_hook(state, nuqsgd_hook)
        steps = []
        for step in range(STEPS):
            net.zero_grad()
            loss_of(ddp, rank, step).backward()
            update(net.parameters(), [parameter.grad for parameter in net.parameters()])
            steps.append(torch.cat([p.detach().flatten() for p in net.parameters()]).numpy())
        dist.barrier()
        found[name] = (steps, state.stats.last.sent_bytes)
        state.close()
    return found
