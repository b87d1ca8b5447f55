"""Last words of a rank: whose failure it was, told to the others before this process ends."""

from __future__ import annotations

from typing import Protocol

import torch.distributed as dist


class Peers(Protocol):
    """What is needed of the exchange."""

    doing: str

    def missing(self, behind: bool = True) -> str:
        """Return which ranks failed, are gone or hang."""

    def whereabouts(self) -> str:
        """Return what the other ranks are doing."""

    def tell(self, text: str, origin: bool) -> None:
        """Tell the other ranks why this one ends."""


def report_failure(peers: Peers, error: BaseException) -> str:
    """Tell the other ranks why this one ends.

    Args:
        peers: The running exchange.
        error: By which training ends here.

    Returns:
        What is known of the cause on other ranks; empty if the failure began here.
    """
    doing = peers.doing
    if isinstance(error, RuntimeError) and "gradient exchange failed" in str(error):
        return ""  # explained and told already
    cause = _cause(peers, error)
    if cause:
        peers.tell(f"stopped in the {doing} because {cause}", origin=False)
        return f"in the {doing} of rank {dist.get_rank()}: {cause}"
    peers.tell(f"raised {type(error).__name__}: {error} (in the {doing})", origin=True)
    return ""


def _cause(peers: Peers, error: BaseException) -> str:
    """Return what other ranks have to do with an error, which only failing collectives raise so."""
    if not isinstance(error, RuntimeError):
        return ""
    missing = peers.missing(behind=False)
    if missing or not _is_collective(error):
        return missing
    return f"all ranks answer ({peers.whereabouts()})"


def _is_collective(error: RuntimeError) -> bool:
    """Return whether a collective failed: NCCL has a class for it, gloo only words."""
    words = ("timed out", "connection closed", "connection reset", "gloo")
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in words)
