"""What strategies on DDP share: its arguments, and hooks on every device type."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from datetime import timedelta
from typing import Any, Literal, TypeVar

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.constants import default_pg_timeout
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from lightning_n2uq.distributed.hook import refuse_sharded
from lightning_n2uq.strategies.ranks import RanksThatAgree
from lightning_n2uq.utils import compat

Init = TypeVar("Init", bound=Callable[..., None])

compat.require(DDPStrategy, "_register_ddp_hooks")


class HookedDDPStrategy(RanksThatAgree, DDPStrategy):
    """DDP with a communication hook, which Lightning itself registers on CUDA only.

    Every argument is named, so that a misspelt one in a config file fails. Cluster environments,
    checkpoint IO and precision come from the trainer (`plugins`).

    Args:
        find_unused_parameters: Whether some parameters get no gradient, as in `DistributedDataParallel`.
        static_graph: Whether every step uses the same parameters, as in `DistributedDataParallel`.
        gradient_as_bucket_view: Whether gradients are views of DDP's buckets.
        bucket_cap_mb: The size of DDP's buckets in MiB; DDP's default if None.
        process_group_backend: The backend of the process groups, `nccl` or `gloo`; chosen by device if None.
        timeout: How long the process groups wait for a peer before they fail.
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
        self.timeout = timeout
        buckets: dict[str, Any] = {} if bucket_cap_mb is None else {"bucket_cap_mb": bucket_cap_mb}
        super().__init__(
            find_unused_parameters=find_unused_parameters,
            static_graph=static_graph,
            gradient_as_bucket_view=gradient_as_bucket_view,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
            **buckets,
        )

    def make_hook(self, model: DistributedDataParallel) -> tuple[object, Callable[..., Any]]:
        """Returns the state and the hook to register on the wrapped model."""
        raise NotImplementedError

    @override
    def setup_distributed(self) -> None:
        """Joins the process group: on one machine over loopback only, also after a restart by torchrun."""
        self.meet()
        super().setup_distributed()

    @override
    def setup(self, trainer: Trainer) -> None:
        """Compares the ranks' settings before a fit, while nothing was exchanged yet; refuses shards."""
        if self.lightning_module is not None:
            refuse_sharded(self.lightning_module)
        self.compare_settings(trainer)
        super().setup(trainer)

    @override
    def _register_ddp_hooks(self) -> None:
        if not isinstance(self.model, DistributedDataParallel):
            raise TypeError(f"the model must be wrapped before hooks are registered, got {type(self.model)}")
        state, hook = self.make_hook(self.model)
        self.model.register_comm_hook(state, hook)


def keywords_of(*owners: type, without: Collection[str] = ()) -> Callable[[Init], Init]:
    """Gives an `__init__(self, **keywords)` the arguments of other classes, defaults and docs included.

    The command line and `help` then show them, and refuse others, though they are written down once.

    Args:
        *owners: The classes whose arguments it takes.
        without: The names of those that it does not take.
    """

    def decorate(init: Init) -> Init:
        own = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
        for owner in owners:
            parameters = inspect.signature(owner, eval_str=True).parameters.values()
            taken = [parameter for parameter in parameters if parameter.name not in without]
            own += [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in taken]
        init.__signature__ = inspect.Signature(own)  # type: ignore[attr-defined]
        init.__annotations__ = {parameter.name: parameter.annotation for parameter in own[1:]}
        docs = [(inspect.getdoc(owner) or "").partition("Args:\n")[2] for owner in owners]
        lines = [doc.partition("\n\n")[0] for doc in docs]
        init.__doc__ = "\n".join(["Takes the arguments of its parts.", "", "Args:", *lines])
        return init

    return decorate
