"""The hook for ``DistributedDataParallel``: ``ddp.register_comm_hook(NUQSGDState(...), nuqsgd_hook)``."""

# No `from __future__ import annotations` here: DDP compares the annotation objects of hooks.

import torch
from torch.distributed import GradBucket  # type: ignore[attr-defined]  # public, not in the stubs

from lightning_n2uq.distributed.refuse import refuse_bucket
from lightning_n2uq.distributed.state import NUQSGDState


def nuqsgd_hook(state: NUQSGDState, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Average a bucket's gradients over the ranks by exchanging quantized messages.

    Returns at once; encoding, exchange and decoding overlap with the backward pass. The mean is
    unbiased, and the same bits on every rank. A NaN or infinity on any rank makes the coordinates
    that share its norm NaN on all ranks.

    Ramezani-Kebrya et al., "NUQSGD", JMLR 22(114), 2021, arXiv 1908.06077.

    Args:
        state: One per DDP module.
        bucket: Dense gradients of any floating dtype.

    Returns:
        Future of the bucket's buffer, overwritten by the mean.

    Raises:
        ValueError: If ``bucket`` comes from FSDP or holds sparse gradients, or ranks disagree on settings.
    """
    if not isinstance(bucket, GradBucket):
        raise refuse_bucket(bucket)
    if bucket.buffer().layout != torch.strided:
        raise ValueError(
            "`bucket` must hold dense gradients, got sparse ones: set `sparse=False` in the embedding"
        )
    return state.synchronise(bucket)
