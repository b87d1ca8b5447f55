"""Starts one process per host of a network and waits for all of them."""

from __future__ import annotations

import os
import subprocess
import sys

from benchmarks.netlab.network import INTERFACE, Network


def run_ranks(network: Network, module: str, arguments: list[str], limit: float) -> None:
    """Run ``python -m module`` as one rank on every host.

    Args:
        network: The hosts.
        module: Name of the module.
        arguments: Its arguments.
        limit: Seconds after which everything is stopped.

    Raises:
        RuntimeError: If a rank fails or the time is over.
    """
    hosts = len(network.hosts)
    ranks = [
        subprocess.Popen(
            [*network.command(rank), sys.executable, "-m", module, *arguments],
            env=os.environ | _environment(rank, hosts, network),
        )
        for rank in range(hosts)
    ]
    try:
        codes = [process.wait(timeout=limit) for process in ranks]
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"not done after {limit} s") from error
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    if any(codes):
        raise RuntimeError(f"ranks ended with {codes}")


def _environment(rank: int, hosts: int, network: Network) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(hosts),
        "NODE_RANK": str(rank),  # Lightning's names: every host is a node of one process
        "LOCAL_RANK": "0",
        "MASTER_ADDR": network.address(0),
        "MASTER_PORT": "29500",
        "GLOO_SOCKET_IFNAME": INTERFACE,
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # hosts without names make the store warn
        "OMP_NUM_THREADS": "1",
        "NUMBA_NUM_THREADS": "1",
    }
