"""Who is missing: every rank answers a question about its progress, also while it trains.

A broken connection only tells an address, and a timeout nothing at all. After a failure the
survivors call the roll: a process that is gone refuses the connection, one that hangs does not
answer, and one that is merely behind says where it is. Nothing is sent before something fails.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

_MAX_REPLY = 64


def own_address() -> str:
    """Return the address of the interface that leads to the rendezvous host."""
    target = os.environ.get("MASTER_ADDR") or socket.gethostname()
    family, _, _, _, place = socket.getaddrinfo(target, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(place)  # sends nothing; asks the routing table
        return str(probe.getsockname()[0])


class RollCall:
    """Answers peers with this rank's progress and asks all of them after a failure.

    Args:
        progress: Returns how many units this rank has handed over.
    """

    def __init__(self, progress: Callable[[], int]) -> None:
        self._progress = progress
        host = own_address()
        self._socket = socket.create_server((host, 0), family=_family(host), backlog=64)
        self.address = f"{host}|{self._socket.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True, name="nuqsgd-rollcall").start()

    def _serve(self) -> None:
        while True:
            try:
                peer, _ = self._socket.accept()
            except OSError:  # closed
                return
            with peer, contextlib.suppress(OSError):
                peer.sendall(str(self._progress()).encode())

    def close(self) -> None:
        """Stop answering."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread up
        self._socket.close()

    def suspects(self, addresses: dict[int, str], grace: float = 3.0) -> list[str]:
        """Return one phrase per rank that is gone, hangs or is behind this one.

        Args:
            addresses: Addresses of the other ranks.
            grace: Seconds to wait for an answer.
        """
        with ThreadPoolExecutor(max_workers=min(64, len(addresses) or 1)) as pool:
            answers = list(pool.map(lambda address: _ask(address, grace), addresses.values()))
        phrases = [
            f"rank {rank} {answer}"
            for rank, answer in zip(addresses, answers, strict=True)
            if isinstance(answer, str)
        ]
        if phrases:
            return phrases
        mine = self._progress()
        return [
            f"rank {rank} is {mine - answer} messages behind"
            for rank, answer in zip(addresses, answers, strict=True)
            if isinstance(answer, int) and answer < mine
        ]


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _ask(address: str, grace: float) -> int | str:
    """Return a peer's progress, or what is wrong with it."""
    host, port = address.split("|")
    try:
        with socket.create_connection((host, int(port)), timeout=grace) as peer:
            peer.settimeout(grace)
            reply = peer.recv(_MAX_REPLY)
    except TimeoutError:
        return f"does not answer within {grace:g} s"
    except OSError:
        return "is gone"
    return int(reply) if reply.isdigit() else "is gone"
