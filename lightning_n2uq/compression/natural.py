"""Natural compression: every number to one of the two powers of two around it."""

import torch
from torch import Tensor

from lightning_n2uq.compression.base import Codec, check_gradient, gradient_buffer, message_buffer
from lightning_n2uq.compression.sign_bits import join_bits, split_bits

_MANTISSA = 23
_ALL_ONES = 255  # the exponent of infinity and NaN


class NaturalCodec(Codec):
    """Sends sign and exponent, 9 bits per coordinate, rounded stochastically and without bias.

    Implements `C_nat` of Horvath et al., "Natural compression for distributed deep learning", MSML 2022
    (arXiv 1905.10988), definition 1: adding a uniform random mantissa to a number and dropping the mantissa
    rounds it between powers of two. There is no norm and no bucket. The message is one exponent byte per
    coordinate, then the signs, eight per byte, lowest bit first.

    A number that is not finite, or is rounded up to 2^128, decodes to NaN. Below 2^-126 the neighbours are 0
    and 2^-126.
    """

    def nbytes(self, numel: int) -> int:
        """Returns nine bits per coordinate."""
        return numel + -(-numel // 8)

    def encode(self, x: Tensor, seed: int, out: Tensor | None = None) -> Tensor:
        """Rounds to powers of two; see `Codec.encode`. Random numbers are those of torch on `x`'s device."""
        x = check_gradient(x)
        message = message_buffer(out, self.nbytes(x.numel()), x.device)
        generator = torch.Generator(x.device).manual_seed(seed & (2**63 - 1))
        pattern = x.view(torch.int32)
        mantissa = torch.randint(
            1 << _MANTISSA, x.shape, generator=generator, dtype=torch.int32, device=x.device
        )
        exponent = ((pattern & 0x7FFFFFFF) + mantissa) >> _MANTISSA
        message[: x.numel()] = torch.where(torch.isfinite(x), exponent, _ALL_ONES).to(torch.uint8)
        message[x.numel() :] = join_bits(pattern < 0)
        return message

    def decode(self, payload: Tensor, numel: int, out: Tensor | None = None) -> Tensor:
        """Puts exponents and signs together; see `Codec.decode`."""
        payload = self.check_message(payload, numel)
        result = gradient_buffer(out, numel, payload.device)
        exponent = payload[:numel].int()
        magnitude = (exponent << _MANTISSA) | (exponent == _ALL_ONES).int()  # infinity to NaN
        sign = split_bits(payload[numel:], numel).int() << 31
        result.copy_((magnitude | sign).view(torch.float32))
        return result

    def variance_bound(self) -> float:
        """Returns 1/8: `(c - x)(x - c / 2) <= x^2 / 8` between `c / 2` and `c`."""
        return 0.125

    def describe(self) -> str:
        """Returns the name; there are no parameters."""
        return "natural"
