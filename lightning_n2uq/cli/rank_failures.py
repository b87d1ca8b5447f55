"""A failure among the ranks, as one line: what was lost, or which setting keeps them from meeting."""

from __future__ import annotations

import errno
import os
import re
import socket

EXIT_CODE = 3
"""Of a rank that ended because of another one; its own settings are right."""

_WORDS = ("connection closed by peer", "connection reset by peer", "gloo/", "nccl")


class RankFailureError(RuntimeError):
    """Another rank, or the link to it, is lost; the message is one line."""

    exit_code = EXIT_CODE


class MeetingError(ValueError):
    """The ranks cannot meet where the environment says; the message is one line."""


def rank_failure(error: BaseException, rank: int, step: int) -> Exception | None:
    """Returns what to show for an error among the ranks, None for any other.

    Args:
        error: The error that ended the run on this rank.
        rank: This rank.
        step: The optimizer steps behind it.
    """
    text = " ".join(str(error).split())
    if found := re.search(r"ranks disagree on .*", text):
        return MeetingError(found.group())
    if not _is_among_ranks(error, text):
        return None
    address, port = os.environ.get("MASTER_ADDR", "localhost"), os.environ.get("MASTER_PORT", "?")
    if "EADDRINUSE" in text:
        return MeetingError(_taken(address, port))
    if found := re.search(r"(\d+)/(\d+) clients joined", text):
        came, of = found.groups()
        return RankFailureError(
            f"ranks: {came} of {of} came to {address}:{port} in time (MASTER_ADDR, MASTER_PORT); "
            "all have to be started, with the same address, port and number of ranks"
        )
    when = "before the first step" if not step else f"at step {step}"
    if found := re.search(r"gradient exchange failed on rank .*?(?= \(\[|$)", text):
        return RankFailureError(_shortened(found.group()))
    return RankFailureError(f"rank {rank} lost another one {when} ({_shortened(text)})")


def check_meeting_place(address: str, port: int, listens: bool) -> None:
    """Refuses an address or port at which the ranks cannot meet, before they wait for each other there.

    Args:
        address: Where rank 0 listens.
        port: The port.
        listens: Whether this process will be the one that listens.

    Raises:
        MeetingError: The address has no host, or the port belongs to another process.
    """
    try:
        family = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][0]
    except OSError as error:
        raise MeetingError(
            f"MASTER_ADDR: got {address!r}, allowed is the address of rank 0's machine ({error.strerror})"
        ) from error
    if not listens:
        return
    try:
        socket.create_server(("", port), family=family).close()
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            raise MeetingError(_taken(address, port)) from error


def _taken(address: str, port: object) -> str:
    return f"MASTER_PORT: got {port}, allowed is a port that no other process listens on (at {address})"


def _is_among_ranks(error: BaseException, text: str) -> bool:
    if any(cls.__name__ == "DistError" for cls in type(error).__mro__):
        return True
    explained = "gradient exchange failed on rank" in text or (" of rank " in text and text.endswith("]"))
    return isinstance(error, RuntimeError) and (explained or any(word in text.lower() for word in _WORDS))


def _shortened(text: str) -> str:
    """Returns a message of torch without its C++ frames, places in its source and advice."""
    text = re.split(r" Exception raised from | frame #0| This is typically caused", text)[0]
    text = re.sub(r"\[/\S+:\d+\] ", "", text)
    return text if len(text) < 400 else text[:200] + " ... " + text[-200:]
