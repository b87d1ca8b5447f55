"""Sparsification: the largest coordinates only."""

import math

import torch
from torch import Tensor

from lightning_n2uq.compression.base import Codec, check_gradient, gradient_buffer, message_buffer
from lightning_n2uq.utils.validation import check_number

_ENTRY = 8  # bytes of a place and a value


class TopKCodec(Codec):
    """Sends the coordinates of largest magnitude exactly and no others: biased, for use with error feedback.

    Implements `top_k` of Stich et al., "Sparsified SGD with memory", NeurIPS 2018 (arXiv 1809.07599). A
    message of `n` coordinates is `k = ceil(density * n)` little-endian int32 places, ascending, then as many
    fp32 values.

    NaN counts as larger than anything, so that it travels.

    Args:
        density: The share of coordinates that are sent, above 0 to 1.

    Raises:
        ValueError: If it is not.
    """

    def __init__(self, density: float = 0.01) -> None:
        check_number("density", density, 0.0, 1.0, above=True)
        self.density = density

    def nbytes(self, numel: int) -> int:
        """Returns eight bytes per coordinate that is sent."""
        return _ENTRY * self._count(numel)

    def _count(self, numel: int) -> int:
        return min(numel, math.ceil(self.density * numel))

    def encode(self, x: Tensor, seed: int, out: Tensor | None = None) -> Tensor:
        """Picks the largest (the seed is not used); see `Codec.encode`."""
        x = check_gradient(x)
        message = message_buffer(out, self.nbytes(x.numel()), x.device)
        count = self._count(x.numel())
        places = x.abs().topk(count, sorted=False).indices.sort().values
        message[: 4 * count] = places.int().view(torch.uint8)
        message[4 * count :] = x[places].view(torch.uint8)
        return message

    def decode(self, payload: Tensor, numel: int, out: Tensor | None = None) -> Tensor:
        """Puts the values in their places, zeros elsewhere; see `Codec.decode`."""
        payload = self.check_message(payload, numel)
        count = self._count(numel)
        places = payload[: 4 * count].clone().view(torch.int32).long()
        if payload.device.type == "cpu" and count and not 0 <= int(places.min()) <= int(places.max()) < numel:
            raise ValueError(f"payload is malformed: a place is outside 0 to {numel - 1}.")
        result = gradient_buffer(out, numel, payload.device).zero_()
        result[places] = payload[4 * count :].clone().view(torch.float32)
        return result

    def variance_bound(self) -> float:
        """Returns `1 - density`: what is left out is at most that share of the square."""
        return 1.0 - self.density

    def describe(self) -> str:
        """Returns name and density."""
        return f"topk(density={self.density})"
