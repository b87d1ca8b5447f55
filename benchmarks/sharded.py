"""Bytes of a step of sharded training, by collective: FSDP2 and HSDP, in full precision and compressed.

    python -m benchmarks sharded

Four gloo processes train a small transformer for two steps each way and count what they hand to the
collectives for other ranks; a process of `hsdp` shares its model with one other. Bytes depend on the shapes
of the model alone, not on the machine.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

RANKS = 4
IN_FULL = {"warmup_steps": 1 << 30}
BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
WAYS: dict[str, tuple[dict[str, Any], bool, MixedPrecisionPolicy]] = {
    "FSDP2": (IN_FULL, False, MixedPrecisionPolicy()),
    "FSDP2, parameters in bf16": (IN_FULL, False, BF16),
    "nuqsgd_fsdp": ({}, False, MixedPrecisionPolicy()),
    "nuqsgd_fsdp, parameters in bf16": ({}, False, BF16),
    "nuqsgd_fsdp, param_bits 8": ({"param_bits": 8}, False, MixedPrecisionPolicy()),
    "HSDP": (IN_FULL, True, MixedPrecisionPolicy()),
    "nuqsgd_fsdp, hsdp": ({}, True, MixedPrecisionPolicy()),
    "nuqsgd_fsdp, hsdp, param_bits 8": ({"param_bits": 8}, True, MixedPrecisionPolicy()),
}
KINDS = ("reduce-scatter", "all-gather", "all-reduce")


class Transformer(nn.Module):
    """A small encoder, sharded block by block."""

    def __init__(self, width: int, depth: int, tokens: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(tokens, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True, dropout=0.0)
            for _ in range(depth)
        )
        self.head = nn.Linear(width, tokens)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the sum of the logits of tokens `[N, L]`."""
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x).sum()


def run(
    device: torch.device, seconds: float, width: int = 256, depth: int = 4, tokens: int = 1024
) -> dict[str, object]:
    """Returns megabytes per rank and step, by way and collective, and prints them as a table."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (folder, width, depth, tokens), nprocs=RANKS)
        found: dict[str, dict[str, float]] = torch.load(f"{folder}/bytes.pt", weights_only=True)
    print("| way | reduce-scatter | all-gather | all-reduce | MB per rank and step | of FSDP2 or HSDP |")
    print("|---|---|---|---|---|---|")
    for way, sent in found.items():
        cells = [f"{sent[kind]:.2f}" if sent[kind] else "-" for kind in KINDS]
        base = found["HSDP" if "hsdp" in way.lower().split(", ") else "FSDP2"]
        total, share = sum(sent.values()), sum(sent.values()) / sum(base.values())
        print(f"| {way} | {' | '.join(cells)} | {total:.2f} | {share:.3f} |")
    return {"width": width, "depth": depth, "tokens": tokens, "ranks": RANKS, "megabytes": found}


def _rank(rank: int, folder: str, width: int, depth: int, tokens: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    found = {way: _sent(Transformer(width, depth, tokens), *options) for way, options in WAYS.items()}
    if rank == 0:
        torch.save(found, f"{folder}/bytes.pt")
    dist.barrier()
    dist.destroy_process_group()


def _sent(
    model: Transformer, settings: dict[str, Any], hsdp: bool, policy: MixedPrecisionPolicy
) -> dict[str, float]:
    from lightning_n2uq.distributed.sharded import ShardedState

    mesh, replicas = init_device_mesh("cpu", (RANKS,)), None
    if hsdp:
        grid = init_device_mesh("cpu", (2, RANKS // 2), mesh_dim_names=("replicas", "shards"))
        mesh, replicas = grid["shards"], dist.get_process_group_ranks(grid.get_group("replicas"))
    for part in (*model.blocks, model):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    state = ShardedState(**settings)
    state.attach(model, replicas)
    for _ in range(2):
        model(torch.zeros(2, 8, dtype=torch.long)).backward()
    state.close()
    return {kind: state.stats.sent_by[kind] / 1e6 for kind in KINDS}
