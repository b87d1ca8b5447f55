"""signSGD's messages: one bit per coordinate and the mean magnitude of every bucket."""

import torch
from torch import Tensor

from lightning_n2uq.compression.base import Codec, check_gradient, gradient_buffer, message_buffer
from lightning_n2uq.compression.sign_bits import join_bits, split_bits
from lightning_n2uq.utils.validation import check_integer


class SignCodec(Codec):
    """Sends signs and, per bucket, the mean magnitude: biased, for use with error feedback.

    Implements the scaled sign `sign(v) ||v||_1 / d` of EF-signSGD (Karimireddy et al., ICML 2019, arXiv
    1901.09847, algorithm 1; the signs are those of Bernstein et al., ICML 2018). Without error feedback it
    need not converge. The message is little-endian fp32 scales, one per bucket, then the signs.

    A bucket with a NaN or an infinity decodes to NaN everywhere.

    Args:
        bucket_size: The number of coordinates that share a scale, a multiple of 8.

    Raises:
        ValueError: If it is not.
    """

    def __init__(self, bucket_size: int = 1024) -> None:
        check_integer("bucket_size", bucket_size, 8)
        self.bucket_size = bucket_size

    def nbytes(self, numel: int) -> int:
        """Returns four bytes per bucket and one bit per coordinate."""
        return 4 * -(-numel // self.bucket_size) + -(-numel // 8)

    def encode(self, x: Tensor, seed: int, out: Tensor | None = None) -> Tensor:
        """Takes signs and mean magnitudes (the seed is not used); see `Codec.encode`."""
        x = check_gradient(x)
        message = message_buffer(out, self.nbytes(x.numel()), x.device)
        whole = x.numel() // self.bucket_size * self.bucket_size
        scales = [x[:whole].view(-1, self.bucket_size).abs().mean(dim=1)]
        if whole < x.numel():
            scales.append(x[whole:].abs().mean().unsqueeze(0))
        scale = torch.cat(scales)
        start = 4 * scale.numel()
        message[:start] = torch.where(torch.isfinite(scale), scale, torch.nan).view(torch.uint8)
        message[start:] = join_bits(x < 0)
        return message

    def decode(self, payload: Tensor, numel: int, out: Tensor | None = None) -> Tensor:
        """Gives every sign its bucket's scale; see `Codec.decode`."""
        payload = self.check_message(payload, numel)
        result = gradient_buffer(out, numel, payload.device)
        start = 4 * -(-numel // self.bucket_size)
        scale = payload[:start].clone().view(torch.float32).repeat_interleave(self.bucket_size)[:numel]
        return torch.where(split_bits(payload[start:], numel), -scale, scale, out=result)

    def variance_bound(self) -> float:
        """Returns `1 - 1 / d`: the error is `1 - ||v||_1^2 / (d ||v||^2)`, and `||v||_1 >= ||v||`."""
        return 1.0 - 1.0 / self.bucket_size

    def describe(self) -> str:
        """Returns name and bucket size."""
        return f"sign(bucket_size={self.bucket_size})"
