"""``python -m benchmarks.codec_error``: the relative squared error of one message, by distribution."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_n2uq.compression import CODECS, AdaptiveCodec, Codec, NUQCodec, make_codec

NUMEL = 65_536
DRAWS = 5


def distributions() -> dict[str, Tensor]:
    """Return gradients of several distributions, the last with scales from 1e-4 to 1e3 in one tensor."""
    generator = torch.Generator().manual_seed(0)
    gauss = torch.randn(NUMEL, generator=generator)
    chi = torch.randn(3, NUMEL, generator=generator).square().mean(dim=0)
    return {
        "normal": gauss,
        "Laplace": torch.empty(NUMEL).exponential_(generator=generator) * gauss.sign(),
        "Student-t(3)": torch.randn(NUMEL, generator=generator) / chi.sqrt(),
        "constant": torch.full((NUMEL,), 0.3),
        "layers": gauss * 10.0 ** torch.arange(-4, 4).repeat_interleave(NUMEL // 8),
    }


def codecs() -> dict[str, Codec]:
    """Return the codecs of the strategies, and rotated ones of other bits and roundings."""
    named = {name: make_codec(name) for name in CODECS if name != "nuqsgd_2bit"}
    plain = NUQCodec(bits=2, norm="linf", bucket_size=256)
    rotated = {
        f"rotated, {bits} bits, {rounding}": NUQCodec(bits, rotation="hadamard", rounding=rounding)
        for rounding in ("stochastic", "eden")
        for bits in (1, 2, 3, 4)
    }
    return {"2 bits, linf, buckets of 256": plain, **named, **rotated}


def error(codec: Codec, x: Tensor) -> float:
    """Return the mean error of a few messages, relative to the gradient's square; levels adapt first."""
    if isinstance(codec, AdaptiveCodec):
        codec.adapt(codec.observe(x))
    messages = (codec.encode(x, seed) for seed in range(DRAWS))
    total = sum((codec.decode(message, NUMEL) - x).double().square().sum() for message in messages)
    return float(total / DRAWS / x.double().square().sum())


def main() -> None:
    """Print a Markdown table."""
    gradients = distributions()
    print("| codec | bits sent | " + " | ".join(gradients) + " |")
    print("|---|---|" + "---|" * len(gradients))
    for name, codec in codecs().items():
        figures = [f"{error(codec, x):.3g}" for x in gradients.values()]
        print(f"| {name} | {8 * codec.nbytes(NUMEL) / NUMEL:.3f} | " + " | ".join(figures) + " |")


if __name__ == "__main__":
    main()
