r"""The codec's variance bound, and what is chosen by it.

The bound holds for all families; `docs/numerics.md` states the case of exponential levels, `k = 1/8`.
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

import itertools
import math

from lightning_n2uq.ops.formats.gradient_codec import NUQFormat


def variance_bound(form: NUQFormat) -> float:
    """Returns an upper bound `e` of `E||Q(v) - v||^2 <= e ||v||^2` (derivation in the module's docstring).

    Args:
        form: The levels, the norm and the bucket size.

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
    """Returns the number of mantissa bits of the `float` family with the smallest variance bound."""
    forms = (NUQFormat(bits, bucket_size, norm, "float", m) for m in range(bits - 1))  # type: ignore[arg-type]
    return min(forms, key=variance_bound).mantissa_bits
