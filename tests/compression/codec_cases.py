"""Vectors and codecs that several tests of the codec go through."""

import itertools

import torch
from torch import Tensor

from lightning_n2uq.compression import NUQCodec
from lightning_n2uq.ops.backends.reference.gradient_codec import bucket_norms, unpack
from lightning_n2uq.ops.formats.gradient_codec import NUQFormat

FAMILIES = ("exponential", "float", "uniform", "list")
BITS = (2, 3, 4, 8)


def make_codec(bits: int, family: str, norm: str, bucket_size: int) -> NUQCodec:
    """A codec of a family; `list` are squares, so neither uniform nor exponential."""
    top = 2 ** (bits - 1) - 1
    levels = [(code / top) ** 2 for code in range(top + 1)] if family == "list" else family
    return NUQCodec(bits=bits, levels=levels, norm=norm, bucket_size=bucket_size)


def all_codecs(bucket_size: int) -> list[NUQCodec]:
    """Every bit width, family and norm."""
    cases = itertools.product(BITS, FAMILIES, ("l2", "linf"))
    return [make_codec(bits, family, norm, bucket_size) for bits, family, norm in cases]


def label(codec: NUQCodec) -> str:
    """A short test id."""
    form = codec.form
    return f"{form.bits}bit-{form.family}{form.mantissa_bits}-{form.norm}-{codec.coding}"


def vectors(numel: int) -> dict[str, Tensor]:
    """The named distributions, each scaled to a largest magnitude of about 1."""
    generator = torch.Generator().manual_seed(numel)
    gauss = torch.randn(numel, generator=generator)
    laplace = torch.empty(numel).exponential_(generator=generator) * gauss.sign()
    heavy = torch.empty(numel).cauchy_(generator=generator)
    spike = torch.zeros(numel)
    spike[numel // 3] = -1.0
    named = {
        "gaussian": gauss,
        "laplace": laplace,
        "heavy-tailed": heavy,
        "constant": torch.full((numel,), -0.7),
    }
    scaled = {name: vector / vector.abs().max() for name, vector in named.items()}
    return {**scaled, "spike": spike, "zero": torch.zeros(numel)}


def laplace(numel: int, seed: int = 0) -> Tensor:
    """Laplace data of scale 1."""
    generator = torch.Generator().manual_seed(seed)
    sign = torch.randint(0, 2, (numel,), generator=generator) * 2 - 1
    return torch.empty(numel).exponential_(generator=generator) * sign


def rounding_variance(x: Tensor, codec: NUQCodec) -> Tensor:
    """Exact variance `(u - r)(r - l) norm^2` of every coordinate of one bucket, in fp64."""
    v = x.double()
    norm = v.norm() if codec.form.norm == "l2" else v.abs().max()
    ratio = (v.abs() / norm).nan_to_num(0.0).clamp(max=1.0)
    levels = torch.tensor(codec.form.levels, dtype=torch.float64)
    lower = (torch.bucketize(ratio, levels, right=True) - 1).clamp(max=len(levels) - 2)
    return (levels[lower + 1] - ratio) * (ratio - levels[lower]) * norm**2


def code_probabilities(x: Tensor, form: NUQFormat) -> Tensor:
    """The exact expected share of every code when `x` is encoded, over the random numbers: fp64, sum 1."""
    rows = -(-x.numel() // form.bucket_size)
    buckets = torch.nn.functional.pad(x, (0, rows * form.bucket_size - x.numel())).view(rows, -1)
    norms = bucket_norms(buckets, form.norm).double().unsqueeze(1)
    ratio = torch.where(norms > 0, buckets.double() / norms, 0.0).view(-1)[: x.numel()]
    levels = torch.tensor(form.levels, dtype=torch.float64)
    lower = (torch.bucketize(ratio.abs(), levels, right=True) - 1).clamp(0, form.top - 1)
    up = ((ratio.abs() - levels[lower]) / (levels[lower + 1] - levels[lower])).clamp(0, 1)
    sign = (ratio < 0).long() << (form.bits - 1)
    weights = torch.zeros(1 << form.bits, dtype=torch.float64)
    weights.index_add_(0, lower + torch.where(lower > 0, sign, 0), 1 - up)
    weights.index_add_(0, lower + 1 + sign, up)
    return weights / max(x.numel(), 1)


def entropy(probabilities: Tensor) -> float:
    """Shannon entropy in bits per symbol."""
    positive = probabilities[probabilities > 0].double()
    return float(-(positive * positive.log2()).sum())


def code_entropy(payload: Tensor, form: NUQFormat, numel: int) -> float:
    """Empirical entropy of the codes in a packed message, in bits per coordinate."""
    codes = unpack(payload[form.norm_bytes(numel) :].cpu(), form.bits, numel)
    counts = torch.bincount(codes, minlength=1 << form.bits)
    return entropy(counts / max(numel, 1))
