"""The codec that changes nothing: fp32 bytes. Warm-up, skipped parameters, and the yardstick of tests."""

import torch
from torch import Tensor

from lightning_n2uq.compression.base import Codec, check_gradient, gradient_buffer, message_buffer


class IdentityCodec(Codec):
    """Sends the fp32 bytes of the gradient; exact, NaN and infinities included."""

    def nbytes(self, numel: int) -> int:
        """Returns four bytes per coordinate."""
        return 4 * numel

    def encode(self, x: Tensor, seed: int, out: Tensor | None = None) -> Tensor:
        """Copies the bytes of `x` (the seed is not used); see `Codec.encode`."""
        x = check_gradient(x)
        message = message_buffer(out, self.nbytes(x.numel()), x.device)
        return message.copy_(x.view(torch.uint8))

    def decode(self, payload: Tensor, numel: int, out: Tensor | None = None) -> Tensor:
        """Copies the bytes back; see `Codec.decode`."""
        payload = self.check_message(payload, numel)
        result = gradient_buffer(out, numel, payload.device)
        result.view(torch.uint8).copy_(payload)
        return result

    def variance_bound(self) -> float:
        """Returns zero: nothing is rounded."""
        return 0.0

    def describe(self) -> str:
        """Returns the name; there are no parameters."""
        return "identity"


def codec_at_step(codec: Codec, step: int, warmup_steps: int) -> Codec:
    """Returns the codec of a step: `IdentityCodec` during warm-up, then `codec`.

    Early gradients change fastest, so the first steps travel in full precision.

    Args:
        codec: The codec after warm-up.
        step: The optimisation step, counted from 0; the same on every rank.
        warmup_steps: The number of steps that travel in full precision.
    """
    return IdentityCodec() if step < warmup_steps else codec
