"""What both kinds of strategies share: typed DDP arguments, and hooks on every device type."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal

from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.constants import default_pg_timeout
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from lightning_n2uq.strategies.rendezvous import own_store
from lightning_n2uq.utils import compat

compat.require(DDPStrategy, "_register_ddp_hooks")  # unless Lightning calls it, no hook would ever run


class HookedDDPStrategy(DDPStrategy):
    """DDP with a communication hook, which Lightning itself registers on CUDA only.

    Every argument is named, so that a misspelt one in a config file fails. Cluster environments,
    checkpoint IO and precision come from the trainer (``plugins``).

    Args:
        find_unused_parameters: As in ``DistributedDataParallel``.
        static_graph: As in ``DistributedDataParallel``.
        gradient_as_bucket_view: As in ``DistributedDataParallel``.
        bucket_cap_mb: Size of DDP's buckets in MiB; DDP's default if None.
        process_group_backend: ``"nccl"``, ``"gloo"``...; chosen by device if None.
        timeout: Of process groups.
        start_method: How Lightning starts the processes of a node.
    """

    def __init__(
        self,
        find_unused_parameters: bool = False,
        static_graph: bool = False,
        gradient_as_bucket_view: bool = False,
        bucket_cap_mb: float | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
    ) -> None:
        more: dict[str, Any] = {} if bucket_cap_mb is None else {"bucket_cap_mb": bucket_cap_mb}
        super().__init__(
            find_unused_parameters=find_unused_parameters,
            static_graph=static_graph,
            gradient_as_bucket_view=gradient_as_bucket_view,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
            **more,
        )
        self.timeout = timeout

    def make_hook(self, model: DistributedDataParallel) -> tuple[object, Callable[..., Any]]:
        """Return the state and the hook to register on the wrapped model."""
        raise NotImplementedError

    @override
    def setup_distributed(self) -> None:
        """Join the process group: on one machine over loopback only, and also after a restart by torchrun."""
        environment = self.cluster_environment
        if environment is not None:
            self.set_world_ranks()
            store = own_store(environment, self.timeout)
            if store is not None:
                compat.init_process_group(
                    environment, compat.process_group_backend(self), store, self.timeout
                )
        super().setup_distributed()

    @override
    def _register_ddp_hooks(self) -> None:
        if not isinstance(self.model, DistributedDataParallel):
            raise TypeError(f"the model must be wrapped before hooks are registered, got {type(self.model)}")
        state, hook = self.make_hook(self.model)
        self.model.register_comm_hook(state, hook)
