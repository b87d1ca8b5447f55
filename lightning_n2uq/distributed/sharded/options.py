"""How the ranks of a sharded training are laid out, and how its parameters travel."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, NamedTuple

from torch.distributed.constants import default_pg_timeout

from lightning_n2uq.utils.validation import check, check_integer

PARAM_DTYPES = ("bfloat16",)


class MeshShape(NamedTuple):
    """The ranks of a job as a grid.

    Attributes:
        replicas: How many copies of the sharded model there are.
        shards: Over how many ranks each copy is sharded.
        tensor: Over how many ranks single layers are split.
    """

    replicas: int
    shards: int
    tensor: int


@dataclass(frozen=True)
class ShardingOptions:
    """What a sharded training needs to know beside the exchange of gradients.

    Args:
        param_bits: 8 gathers parameters for each use in 8 bits, with unbiased rounding; null in full
            precision.
        hsdp: Whether to shard inside a node, in full precision, and average compressed between nodes.
        shard_size: With `hsdp`, the ranks that share one copy of the model; this node's processes if null.
        param_dtype: `bfloat16` computes in bf16, while gradients are reduced and the optimizer works in
            fp32. Null computes in the parameters' own dtype.
        data_parallel_size: The ranks that get different data; `auto` takes all that `tensor_parallel_size`
            leaves.
        tensor_parallel_size: The ranks over which `configure_model` splits layers; `auto` takes this node's
            processes.
        save_distributed_checkpoint: Whether a checkpoint is a folder with a file per rank. Otherwise rank 0
            writes a single file, which all commands of this package read.
        process_group_backend: The backend of the process groups, `nccl` or `gloo`; chosen by device if null.
        timeout: How long the process groups wait for a peer before they fail.

    Raises:
        ValueError: If a value is not allowed; the message names the argument.
    """

    param_bits: int | None = None
    hsdp: bool = False
    shard_size: int | None = None
    param_dtype: Literal["bfloat16"] | None = None
    data_parallel_size: Literal["auto"] | int = "auto"
    tensor_parallel_size: Literal["auto"] | int = 1
    save_distributed_checkpoint: bool = False
    process_group_backend: str | None = None
    timeout: timedelta | None = default_pg_timeout

    def __post_init__(self) -> None:
        allowed = f"are {', '.join(PARAM_DTYPES)} and null"
        check(self.param_dtype in (None, *PARAM_DTYPES), "param_dtype", self.param_dtype, allowed)
        for name in ("data_parallel_size", "tensor_parallel_size", "shard_size"):
            value = getattr(self, name)
            if value not in ("auto", None):
                check_integer(name, value, 1)
        check(self.hsdp or self.shard_size is None, "shard_size", self.shard_size, "with hsdp only")

    def mesh_shape(self, world_size: int, node_size: int) -> MeshShape:
        """Returns the grid of a job's ranks.

        Args:
            world_size: All ranks.
            node_size: The ranks of a node.

        Raises:
            ValueError: If the grid cannot hold that many ranks.
        """
        tensor = node_size if self.tensor_parallel_size == "auto" else self.tensor_parallel_size
        _check_divides("tensor_parallel_size", tensor, world_size)
        data = world_size // tensor
        if self.data_parallel_size not in ("auto", data):
            raise ValueError(
                f"data_parallel_size: got {self.data_parallel_size}, allowed is {data} with {world_size} "
                f"ranks and tensor_parallel_size {tensor}"
            )
        if not self.hsdp or data == 1:
            return MeshShape(1, data, tensor)
        shards = self.shard_size or max(1, node_size // tensor)
        _check_divides("shard_size", shards, data)
        if shards == data:
            raise ValueError(
                f"shard_size: got {shards}, allowed with hsdp is less than the {data} data-parallel ranks: a "
                "single copy of the model leaves nothing to compress"
            )
        return MeshShape(data // shards, shards, tensor)


def _check_divides(name: str, size: int, ranks: int) -> None:
    check(ranks % size == 0, name, size, f"are divisors of {ranks} ranks")
