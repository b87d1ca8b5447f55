"""A process group that comes up again after ``torchrun --max-restarts`` started the workers anew."""

from __future__ import annotations

import os

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous


def store_after_restart() -> dist.Store | None:
    """Return the store for this attempt's process group; None where torch's own choice is right.

    The workers of every attempt share one store at torchrun's agent. Recent versions of torch put all
    attempts' addresses under the same keys of it, so that gloo connects to ranks of the last attempt that
    are no more ("connection refused"). Each attempt gets keys of its own here, on a single node: nodes may
    count attempts differently (https://github.com/pytorch/pytorch/issues/135712), there
    ``TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1`` for torchrun helps.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    single = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    if attempt == "0" or not shared or not single or dist.is_initialized():
        return None
    store, _, _ = next(rendezvous("env://"))
    return dist.PrefixStore(f"attempt_{attempt}", store)
