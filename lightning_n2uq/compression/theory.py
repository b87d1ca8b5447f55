r"""What the codec does in expectation: variance bound, code distribution, entropy, expected code length.

Variance bound (all families; docs/numerics.md's figures for exponential levels are the case `k = 1/8`).
Let `0 = l_0 < l_1 < .. = 1` be the levels and `r_i = |v_i| / ||v||_p`. Rounding `r` in `[l, u]` without bias
has the variance `(u - r)(r - l)`.

1. Above `l_1`, `(u - r)(r - l) <= k r^2` with `k = max (u - l)^2 / (4 u l)` over neighbours, reached at
   `r = 2ul / (u + l)`. Exponential levels: 1/8. With `m` mantissa bits: `4^-m / (4 (1 + 2^-m))`.
2. Below `l_1` the variance is `r (l_1 - r)`. If these coordinates hold the share `q` of `sum r^2`,
   Cauchy-Schwarz gives `sum r <= sqrt(d q sum r^2)`.
3. `p = 2`: `sum r^2 = 1`, so the relative variance is at most `k (1 - q) + a sqrt(q) - q` with
   `a = l_1 sqrt(d)`. Its maximum over `q` in 0..1 is `k + a^2 / (4 (1 + k))` if `a <= 2 (1 + k)`
   (at `sqrt(q) = a / (2 (1 + k))`), otherwise `a - 1` (at `q = 1`).
4. `p = inf`: one coordinate is exactly 1 and has no variance. With `S` the small coordinates' `sum r^2`
   and `R` everybody's, the relative variance is at most `(k (R - S - 1) + a sqrt(S) - S) / R` with
   `a = l_1 sqrt(d - 1)`: either at most `k`, or largest at `R = S + 1`, where the maximum over `S`
   is `(sqrt(1 + a^2) - 1) / 2`. The bound is the larger of the two.

Ramezani-Kebrya et al., JMLR 22(114), 2021 (arXiv 1908.06077), theorem 4, bounds the same quantity for
exponential levels; the constants here are tighter because both regions are maximised together.
"""

import heapq
import itertools
import math

import torch
from torch import Tensor

from lightning_n2uq.ops.nuq_format import NUQFormat
from lightning_n2uq.ops.nuq_reference import bucket_norms, unpack


def variance_bound(form: NUQFormat) -> float:
    """Upper bound `e` of `E||Q(v) - v||^2 <= e ||v||^2` (derivation in the module's docstring).

    Args:
        form: Levels, norm and bucket size.

    Returns:
        The bound; rounding of fp32 arithmetic adds a relative 1e-6 at most.
    """
    levels = form.levels
    pairs = itertools.pairwise(levels[1:])
    kappa = max(((high - low) ** 2 / (4 * high * low) for low, high in pairs), default=0.0)
    if form.norm == "linf":
        a = levels[1] * math.sqrt(form.bucket_size - 1)
        return max(kappa, (math.hypot(1, a) - 1) / 2)
    a = levels[1] * math.sqrt(form.bucket_size)
    return kappa + a * a / (4 * (1 + kappa)) if a <= 2 * (1 + kappa) else a - 1


def best_mantissa_bits(bits: int, bucket_size: int, norm: str) -> int:
    """The number of mantissa bits of the `float` family with the smallest variance bound."""
    forms = (NUQFormat(bits, bucket_size, norm, "float", m) for m in range(bits - 1))  # type: ignore[arg-type]
    return min(forms, key=variance_bound).mantissa_bits


def code_probabilities(x: Tensor, form: NUQFormat) -> Tensor:
    """The exact expected histogram of codes when `x` is encoded, over the random numbers.

    Args:
        x: 1-D fp32 tensor with finite entries.
        form: The wire format.

    Returns:
        fp64 tensor `[2**bits]` that sums to 1: the expected share of every code.
    """
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
    """Shannon entropy in bits per symbol; the floor of every coder that treats symbols one by one."""
    positive = probabilities[probabilities > 0].double()
    return float(-(positive * positive.log2()).sum())


def code_entropy(payload: Tensor, form: NUQFormat, numel: int) -> float:
    """Empirical entropy of the codes in a packed message, in bits per coordinate."""
    codes = unpack(payload[form.norm_bytes(numel) :].cpu(), form.bits, numel)
    counts = torch.bincount(codes, minlength=1 << form.bits)
    return entropy(counts / max(numel, 1))


def expected_code_length(probabilities: Tensor, group: int = 1) -> float:
    """Exact expected length of a Huffman code of independent codes, in bits per coordinate.

    Huffman coding of `group` codes at a time costs at most `entropy + 1 / group`.

    Args:
        probabilities: Expected share of every code, for example from `code_probabilities`.
        group: How many codes make one symbol.

    Returns:
        The expected length: the sum of all inner nodes of the Huffman tree, divided by `group`.
    """
    joint = probabilities.double()
    for _ in range(group - 1):
        joint = torch.outer(joint, probabilities.double()).view(-1)
    heap = [share for share in joint.tolist() if share > 0]
    if len(heap) < 2:
        return 1.0 / group
    heapq.heapify(heap)
    length = 0.0
    while len(heap) > 1:
        node = heapq.heappop(heap) + heapq.heappop(heap)
        length += node
        heapq.heappush(heap, node)
    return length / group
