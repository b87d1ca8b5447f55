"""Who is missing: every rank answers a question about its progress, also while it trains.

A broken connection only tells an address, and a timeout nothing at all. After a failure the
survivors call the roll: a process that is gone refuses the connection, one that hangs does not
answer, and one that is merely behind says where it is. A rank that ends by an error says so to all
others before its connections break. Nothing is sent before something fails.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from lightning_n2uq.distributed.answer import Answer, Notice

_MAX_BYTES = 1024
_LISTENING = 3.0  # seconds for a peer that closed a connection to say why
_BREAKS = ("reset by peer", "closed by peer", "Broken pipe", "Connection refused")
_PATIENCE = 1.0  # seconds for a peer to say what it wants; one slow peer must not block the others


def own_address() -> str:
    """Return the address of the interface that leads to the rendezvous host."""
    target = os.environ.get("MASTER_ADDR") or socket.gethostname()
    family, _, _, _, place = socket.getaddrinfo(target, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(place)  # sends nothing; asks the routing table
        return str(probe.getsockname()[0])


class RollCall:
    """Answers peers with this rank's progress, asks them after a failure and tells them of one.

    Args:
        answer: Returns what this rank has handed over and what it is doing.
    """

    def __init__(self, answer: Callable[[], Answer]) -> None:
        self._answer = answer
        self.notices: dict[int, Notice] = {}
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
                peer.settimeout(_PATIENCE)
                self._note(_read(peer))
                peer.sendall(self._answer().encode())

    def _note(self, message: bytes) -> None:
        notice = Notice.decode(message)  # None: only a question
        if notice is not None:
            self.notices.setdefault(notice.rank, notice)

    def close(self) -> None:
        """Stop answering."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread up
        self._socket.close()

    def tell(self, notice: Notice, addresses: dict[int, str], grace: float = 3.0) -> None:
        """Tell all others why this rank ends; returns when they know, after ``grace`` seconds at most."""
        self._ask_all(addresses, grace, notice.encode())

    def suspects(self, addresses: dict[int, str], grace: float = 3.0, behind: bool = True) -> list[str]:
        """Return one phrase per rank that failed, is gone, hangs or is behind this one.

        Ranks that only stopped because of another one are left out where that other one is known.

        Args:
            addresses: Addresses of the other ranks.
            grace: Seconds to wait for an answer.
            behind: Whether to mention ranks that answer and are behind.
        """
        answers = self._ask_all(addresses, grace, b"?")
        notices = {rank: notice for rank, notice in self.notices.items() if rank in addresses}
        origins = [f"rank {rank} {notice.text}" for rank, notice in notices.items() if notice.origin]
        silent = [
            f"rank {rank} {answer}"
            for rank, answer in answers.items()
            if isinstance(answer, str) and rank not in notices
        ]
        if not origins and len(silent) == len(addresses) > 1:
            silent.append("no other rank can be asked: check this rank's own network")
        phrases = origins + silent
        phrases = phrases or [f"rank {rank} {notice.text}" for rank, notice in notices.items()]
        if phrases or not behind:
            return phrases
        mine = self._answer().handed_over
        return [
            f"rank {rank} is {mine - answer.handed_over} messages behind: {answer.doing}"
            for rank, answer in answers.items()
            if isinstance(answer, Answer) and answer.handed_over < mine
        ]

    def cause(self, addresses: dict[int, str], error: BaseException) -> list[str]:
        """Return :meth:`suspects` of an error; if a connection broke and nobody seems to be why, ask again.

        Whoever closed a connection is about to say so, and on a slow link that takes a moment.
        """
        found = self.suspects(addresses)
        broke = any(phrase in str(error) for phrase in _BREAKS)
        deadline = time.monotonic() + _LISTENING
        while broke and not self.notices and not found and time.monotonic() < deadline:
            time.sleep(0.1)
            if self.notices:
                found = self.suspects(addresses)
        return found

    def whereabouts(self, addresses: dict[int, str], grace: float = 3.0, limit: int = 8) -> str:
        """Return what the others are doing, for a failure that no rank explains."""
        answers = list(self._ask_all(addresses, grace, b"?").items())
        phrases = [
            f"rank {rank}: {answer.doing if isinstance(answer, Answer) else answer}"
            for rank, answer in answers[:limit]
        ]
        return "; ".join([*phrases, *(["..."] if len(answers) > limit else [])])

    @staticmethod
    def _ask_all(addresses: dict[int, str], grace: float, message: bytes) -> dict[int, Answer | str]:
        with ThreadPoolExecutor(max_workers=min(64, len(addresses) or 1)) as pool:
            answers = pool.map(lambda address: _ask(address, grace, message), addresses.values())
            return dict(zip(addresses, answers, strict=True))


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _read(peer: socket.socket) -> bytes:
    """Return what a peer sends until it stops sending."""
    message = b""
    while len(message) < _MAX_BYTES:
        piece = peer.recv(_MAX_BYTES - len(message))
        if not piece:
            break
        message += piece
    return message


def _ask(address: str, grace: float, message: bytes) -> Answer | str:
    """Return a peer's answer, or what is wrong with it."""
    host, port = address.split("|")
    try:
        with socket.create_connection((host, int(port)), timeout=grace) as peer:
            peer.settimeout(grace)
            peer.sendall(message)
            peer.shutdown(socket.SHUT_WR)
            reply = Answer.decode(_read(peer))
    except TimeoutError:
        return f"does not answer within {grace:g} s"
    except (ConnectionRefusedError, ConnectionResetError, BrokenPipeError):
        return "is gone"
    except OSError as error:
        return f"cannot be reached ({error.strerror})"
    return "is gone" if reply is None else reply
