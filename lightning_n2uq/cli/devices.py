"""The `--device` of commands that run a network without a trainer."""

from __future__ import annotations

import torch


def device_of(name: str) -> torch.device:
    """Returns the device of a name.

    Raises:
        ValueError: torch does not know it, or there is none of it here; one line.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ValueError(
            f"device: got {name!r}, allowed are cpu and cuda where there is one ({reason})"
        ) from error
    return device
