"""Compressed collectives for FSDP2 (`torch.distributed.fsdp.fully_shard`), for plain PyTorch and Lightning.

Reading order: `comm` (the three collectives) -> `messages` (what a message holds) -> `state`.
"""

from lightning_n2uq.distributed.sharded.comm import (
    CompressedAllGather,
    CompressedAllReduce,
    CompressedReduceScatter,
)
from lightning_n2uq.distributed.sharded.state import ShardedState

__all__ = ["CompressedAllGather", "CompressedAllReduce", "CompressedReduceScatter", "ShardedState"]
