"""What both kinds of strategies share: DDP's arguments, hooks on every device type, where the ranks meet."""

from __future__ import annotations

import inspect
import os
import socket
from collections.abc import Callable, Collection
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch.distributed as dist
from lightning.fabric.plugins import ClusterEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch.distributed.constants import default_pg_timeout
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from lightning_n2uq.distributed.collectives import require_equal
from lightning_n2uq.distributed.hook import refuse_sharded
from lightning_n2uq.strategies import agreement
from lightning_n2uq.utils import compat, compat_lightning
from lightning_n2uq.utils.compat import PrefixStore, Store, TCPStore

_LOOPBACK_INTERFACES = ("lo", "lo0")

Init = TypeVar("Init", bound=Callable[..., None])

compat.require(DDPStrategy, "_register_ddp_hooks")


class HookedDDPStrategy(DDPStrategy):
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
        self._compared = False
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
        environment = self.cluster_environment
        if environment is not None:
            self.set_world_ranks()
            store = meeting_store(environment, self.timeout)
            if store is not None:
                agreement.require_presence(
                    store, environment.global_rank(), environment.world_size(), self.timeout
                )
                backend = compat_lightning.process_group_backend(self)
                compat_lightning.init_process_group(environment, backend, store, self.timeout)
        super().setup_distributed()

    @override
    def setup(self, trainer: Trainer) -> None:
        """Compares the ranks' settings before a fit, while nothing was exchanged yet; refuses shards."""
        if self.lightning_module is not None:
            refuse_sharded(self.lightning_module)
        self._compared = trainer.state.fn != TrainerFn.FITTING or self.world_size == 1
        if not self._compared and self.lightning_module is not None:
            name = type(self).__name__
            agreement.require_same(agreement.settings(trainer, self.lightning_module, name), self.timeout)
        super().setup(trainer)

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Compares what the ranks train with before the first step."""
        if not self._compared and self.lightning_module is not None:
            self._compared = True
            require_equal(agreement.training(self.lightning_module.trainer), self.root_device)
        return super().training_step(*args, **kwargs)

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


# Where the ranks meet


def meeting_store(environment: ClusterEnvironment, timeout: timedelta | None = None) -> Store | None:
    """Returns the store at which this process group meets; None where torch's own choice is right.

    After a restart by torchrun it has keys of its own; where all ranks meet at a loopback address it
    listens there alone, while torch's own listens on every address. Gloo, too, is then kept on the
    loopback interface (it follows the machine's name), unless `GLOO_SOCKET_IFNAME` says otherwise.

    Args:
        environment: Knows the ranks, the address and the port.
        timeout: How long to wait for the other ranks; torch's default if None.
    """
    if dist.is_initialized():
        return None
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            _keep_gloo_on_loopback()
        return _store_after_restart()
    address = environment.main_address
    if address != "localhost" and not address.startswith("127."):
        return None
    _keep_gloo_on_loopback()
    return _store_on_loopback(environment, timeout or default_pg_timeout)


def _store_after_restart() -> Store | None:
    """Returns keys of its own for every attempt of `torchrun --max-restarts`.

    All attempts share one store at torchrun's agent, and recent versions of torch put all attempts' addresses
    under the same keys of it, so that gloo connects to ranks of the last attempt that are no more
    ("connection refused"). This is for a single node: several may count attempts differently
    (https://github.com/pytorch/pytorch/issues/135712); `TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1` for torchrun
    helps there.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        return None
    store, _, _ = next(rendezvous("env://"))
    return PrefixStore(f"attempt_{attempt}", store)


def _store_on_loopback(environment: ClusterEnvironment, timeout: timedelta) -> Store | None:
    address, port = environment.main_address, environment.main_port
    listening = None
    if environment.global_rank() == 0:
        try:
            listening = socket.create_server((address, port), backlog=2048).detach()
        except OSError:  # taken, perhaps by an earlier store of this process, which torch knows how to share
            return None
    return TCPStore(
        address,
        port,
        environment.world_size(),
        is_master=listening is not None,
        timeout=timeout,
        multi_tenant=True,
        master_listen_fd=listening,
    )


def _keep_gloo_on_loopback() -> None:
    names = {name for _, name in socket.if_nameindex()}
    for name in _LOOPBACK_INTERFACES:
        if name in names:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
