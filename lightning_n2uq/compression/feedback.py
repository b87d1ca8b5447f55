"""Error feedback: what rounding took away from one message is added to the next."""

from collections.abc import Hashable

import torch
from torch import Tensor

from lightning_n2uq.compression.base import Codec, check_gradient


class ErrorFeedback:
    """Holds residuals by key and corrects gradients with them before encoding.

    Seide et al., Interspeech 2014; Karimireddy et al., ICML 2019 (arXiv 1901.09847), algorithm 2. The sum of
    what was sent then follows the sum of the gradients; a single message is no longer unbiased.

    A non-finite gradient must not stay in the residual for ever: wherever the new residual would not be
    finite, the old one is kept, so that a step skipped by a loss scaler leaves no trace.
    """

    def __init__(self) -> None:
        self.residuals: dict[Hashable, Tensor] = {}

    def encode(self, codec: Codec, key: Hashable, x: Tensor, seed: int, out: Tensor | None = None) -> Tensor:
        """Encodes `x` plus the residual of `key`, and stores what the message misses.

        Args:
            codec: The codec of this message.
            key: The owner of the residual, the same at every step (DDP may rebuild its buckets after the
                first).
            x: A 1-D fp32 tensor, which is not modified.
            seed: The seed of the rounding, as in `Codec.encode`.
            out: The buffer of the message, as in `Codec.encode`.

        Returns:
            The message, as from `Codec.encode`.

        Raises:
            ValueError: If the stored residual has another size.
        """
        x = check_gradient(x)
        residual = self.residuals.get(key)
        if residual is None:
            residual = torch.zeros_like(x)
        payload, self.residuals[key] = encode_with_residual(codec, x, residual, seed, out)
        return payload


def encode_with_residual(
    codec: Codec, x: Tensor, residual: Tensor, seed: int, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Performs one step of error feedback, for callers that keep the residuals themselves.

    Args:
        codec: The codec of this message.
        x: A 1-D fp32 tensor.
        residual: A finite fp32 tensor of the same size.
        seed: The seed of the rounding, as in `Codec.encode`.
        out: The buffer of the message, as in `Codec.encode`.

    Returns:
        The message of `x + residual`, and the next residual (a new tensor): `x + residual - decoded` where
        that is finite, the old residual elsewhere.

    Raises:
        ValueError: If the sizes differ.
    """
    if residual.shape != x.shape:
        raise ValueError(f"residual must have the shape {list(x.shape)} of x, got {list(residual.shape)}.")
    residual = residual.to(x.device)
    corrected = x + residual
    payload = codec.encode(corrected, seed, out)
    error = corrected.sub_(codec.decode(payload, x.numel()))
    return payload, torch.where(torch.isfinite(error), error, residual)
