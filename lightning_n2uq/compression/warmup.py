"""Warm-up: the first steps travel in full precision, because early gradients change fastest."""

from lightning_n2uq.compression.base import Codec
from lightning_n2uq.compression.identity import IdentityCodec


def codec_at_step(codec: Codec, step: int, warmup_steps: int) -> Codec:
    """The codec to use at a step: `IdentityCodec` during warm-up, then `codec`.

    Args:
        codec: The codec after warm-up.
        step: Optimisation step, from 0; the same on every rank.
        warmup_steps: How many steps travel in full precision.
    """
    return IdentityCodec() if step < warmup_steps else codec
