"""The strategy for models that `fully_shard` has sharded: `--trainer.strategy nuqsgd_fsdp`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from lightning_n2uq.checkpointing.reading import check_intact
from lightning_n2uq.distributed.config import ExchangeConfig, take_fields
from lightning_n2uq.distributed.sharded import ShardedState
from lightning_n2uq.distributed.sharded.attach import require_shards, sharded_parts
from lightning_n2uq.distributed.sharded.options import MeshShape, ShardingOptions
from lightning_n2uq.distributed.sharded.settings import check_settings
from lightning_n2uq.strategies import agreement
from lightning_n2uq.strategies.base import keywords_of
from lightning_n2uq.strategies.ranks import RanksThatAgree, RanksThatTell
from lightning_n2uq.strategies.whole_weights import refuse_whole_weights
from lightning_n2uq.utils import compat

if TYPE_CHECKING:
    from torch.distributed.fsdp import MixedPrecisionPolicy

KEY = "nuqsgd_fsdp"
_REPLICAS, _SHARDS, _TENSOR = "replicas", "data_parallel", "tensor_parallel"

compat.require(ModelParallelStrategy, "_setup_distributed")


class ShardedNUQSGDStrategy(RanksThatTell, RanksThatAgree, ModelParallelStrategy):
    """FSDP2 whose collectives travel in few bits.

    Registered as `nuqsgd_fsdp`. The LightningModule applies `fully_shard` in `configure_model`, on
    `self.device_mesh["data_parallel"]`; the modules of this package do it by themselves. Gradients are
    reduced into shards by the messages of NUQSGD (or, with `hsdp`, in full precision inside a node and by
    those between nodes), parameters are gathered in full precision or in 8 bits (QSDP, Markov et al.,
    ICML 2023, arXiv 2302.02390). With accumulation only the last micro-batch is reduced.
    Evaluation gathers parameters in full precision.

    Args:
        **arguments: The fields of `ExchangeConfig` and of `ShardingOptions`.

    Attributes:
        state: The step and the counters; None before training.

    Raises:
        ValueError: If an argument is not allowed, or would have no effect; the message names it.
    """

    state: ShardedState | None

    @keywords_of(ExchangeConfig, ShardingOptions)
    def __init__(self, **arguments: Any) -> None:  # noqa: ANN401  # typed by those two
        self.config = ExchangeConfig(**take_fields(ExchangeConfig, arguments))
        self.options = ShardingOptions(**arguments)
        check_settings(self.config, self.options.param_bits, self.options.hsdp)
        super().__init__(
            data_parallel_size=self.options.data_parallel_size,
            tensor_parallel_size=self.options.tensor_parallel_size,
            save_distributed_checkpoint=self.options.save_distributed_checkpoint,
            process_group_backend=self.options.process_group_backend,
            timeout=self.options.timeout,
        )
        self.timeout, self.state = self.options.timeout, None
        self._shape = MeshShape(1, 1, 1)
        self._replicas: list[int] | None = None

    @property
    def mp_policy(self) -> MixedPrecisionPolicy:
        """The dtypes to compute and to reduce in, for `fully_shard` in `configure_model`."""
        from torch.distributed.fsdp import MixedPrecisionPolicy

        if self.options.param_dtype is None:
            return MixedPrecisionPolicy()
        return MixedPrecisionPolicy(
            param_dtype=getattr(torch, self.options.param_dtype), reduce_dtype=torch.float32
        )

    # Ranks

    @override
    def setup_environment(self) -> None:
        """Joins the process group and makes the mesh, whose `data_parallel` ranks are those of the shards."""
        self._setup_distributed()
        if self.world_size > 1:  # a mesh of other shapes on other ranks would hang
            facts = {f"strategy.{name}": agreement.plain(value) for name, value in vars(self.options).items()}
            agreement.require_same(facts, self.timeout)
        self._shape = shape = self.options.mesh_shape(self.world_size, self.num_processes)
        self._data_parallel_size, self._tensor_parallel_size = shape.replicas * shape.shards, shape.tensor
        names: tuple[str, ...] = (_REPLICAS, _SHARDS, _TENSOR)
        keep = slice(0 if shape.replicas > 1 else 1, None)
        mesh = dist.device_mesh.init_device_mesh(
            self.root_device.type, tuple(shape)[keep], mesh_dim_names=names[keep]
        )
        if shape.replicas > 1:
            self._replicas = dist.get_process_group_ranks(mesh.get_group(_REPLICAS))
            mesh = mesh[_SHARDS, _TENSOR]
        self._device_mesh = mesh
        if self.lightning_module is not None:
            self.lightning_module._device_mesh = mesh

    @override
    def _setup_distributed(self) -> None:
        """Joins the process group: on one machine over loopback only, also after a restart by torchrun."""
        self.meet()
        super()._setup_distributed()

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """The ranks that get different data: all shards of all replicas."""
        return {
            "num_replicas": self._shape.replicas * self._shape.shards,
            "rank": self.global_rank // self._shape.tensor,
        }

    @override
    def setup(self, trainer: Trainer) -> None:
        """Compares settings before a fit, refuses what needs whole weights, and compresses collectives."""
        self.compare_settings(trainer)
        if trainer.state.fn == TrainerFn.FITTING:
            refuse_whole_weights(trainer.callbacks)  # type: ignore[attr-defined]
        module = self.lightning_module
        if module is not None:
            require_shards(module, self._replicas)
        super().setup(trainer)
        if trainer.state.fn == TrainerFn.FITTING and module is not None:
            self.state = ShardedState(self.options.param_bits, timeout=self.timeout, config=self.config)
            self.state.attach(module, self._replicas)

    # Steps

    @contextmanager
    @override
    def block_backward_sync(self) -> Iterator[None]:  # type: ignore[override]  # Lightning annotates it loosely
        """Keeps gradients unreduced: Lightning does so for all micro-batches of a step but the last."""
        parts = [] if self.model is None else sharded_parts(self.model)
        for part in parts:
            part.set_requires_gradient_sync(False, recurse=False)
        try:
            yield
        finally:
            for part in parts:
                part.set_requires_gradient_sync(True, recurse=False)

    # Checkpoints

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Adds the step counter, unless only weights are saved."""
        if self.state is not None and "optimizer_states" in checkpoint:
            checkpoint[KEY] = self.state.state_dict()
        super().save_checkpoint(checkpoint, filepath, storage_options)

    @override
    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Continues the step counter; the checkpoint may be a file or a folder, of any number of ranks."""
        if Path(checkpoint_path).is_file():
            check_intact(str(checkpoint_path), "ckpt_path")
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only=weights_only)
        if self.state is not None and KEY in checkpoint:
            self.state.load_state_dict(checkpoint[KEY])
        return checkpoint

    @override
    def teardown(self) -> None:
        """Leaves the module in shards.

        FSDP2 keeps the outermost parameters gathered after a validation; an optimizer made from those would
        not train the shards.
        """
        for part in [] if self.model is None else sharded_parts(self.model):
            part.reshard()
        super().teardown()
