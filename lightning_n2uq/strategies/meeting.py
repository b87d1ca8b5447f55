"""Where the ranks of one machine meet: on loopback, and under keys of their own after a restart."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import torch.distributed as dist
from lightning.fabric.plugins import ClusterEnvironment
from torch.distributed.constants import default_pg_timeout
from torch.distributed.rendezvous import rendezvous

from lightning_n2uq.utils.compat import PrefixStore, Store, TCPStore

_LOOPBACK_INTERFACES = ("lo", "lo0")


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
