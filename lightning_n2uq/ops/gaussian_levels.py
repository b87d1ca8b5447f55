r"""Levels for normally distributed numbers: those of nearest and those of unbiased stochastic rounding.

Both are derived here numerically, and rounded to the multiples of `2**-11` and `2**-12` that messages are
made of, so that sums with them are exact. With `phi` and `Phi` the density and distribution of a standard
normal `x`:

- Nearest rounding (Lloyd, IEEE Trans. Inf. Theory 28(2), 1982; Max, IRE Trans. Inf. Theory 6(1), 1960): a
  border lies half way between two levels, a level is the mean of the numbers between its borders `a` and `b`,
  `(phi(a) - phi(b)) / (Phi(b) - Phi(a))`. Iterating the two converges, as `log phi` is concave.
- Stochastic rounding between neighbours `a < x < c` has the variance `(c - x)(x - a)`. With its neighbours
  fixed, the expected variance is least in a level `l` where the derivative vanishes,

      int_a^l (x - a) dPhi = int_l^c (c - x) dPhi,   hence   Phi(l) (c - a) = c Phi(c) - a Phi(a) - int_a^c x
      dPhi.

  That is the coordinate descent of ALQ (Faghri et al., NeurIPS 2020, arXiv 2010.12460, section 3.1) with the
  normal distribution in place of the gradient's. The outermost levels are fixed: they cover the largest of
  the `count` numbers that share a scale, and stand where that is in the median.

Both families are symmetric and have no level 0, so that `bits` bits give `2**bits` levels; the functions
return the positive half.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from statistics import NormalDist

NEAREST_UNIT = 2.0**-11
STOCHASTIC_UNIT = 2.0**-12

_NORMAL = NormalDist()
_SWEEPS = 5000
_STILL = 1e-9


@functools.cache
def nearest_levels(bits: int) -> tuple[float, ...]:
    """Returns the `2**(bits - 1)` positive Lloyd-Max levels of the standard normal distribution.

    Args:
        bits: The bits per number, sign included.

    Returns:
        Ascending numbers in standard deviations, multiples of `NEAREST_UNIT`.
    """
    count = 1 << (bits - 1)
    levels = [(index + 0.5) * 2.5 / count for index in range(count)]
    for _ in range(_SWEEPS):
        means = [_mean(low, high) for low, high in itertools.pairwise(_borders(levels))]
        moved = max(abs(mean - level) for mean, level in zip(means, levels, strict=True))
        levels = means
        if moved < _STILL:
            break
    return _rounded(levels, NEAREST_UNIT)


def nearest_borders(levels: tuple[float, ...]) -> tuple[float, ...]:
    """Returns the borders between ascending positive levels: their midpoints."""
    return tuple((low + high) / 2 for low, high in itertools.pairwise(levels))


@functools.cache
def stochastic_levels(bits: int, count: int) -> tuple[float, ...]:
    """Returns the `2**(bits - 1)` positive levels that are best for stochastic rounding of normal numbers.

    Args:
        bits: The bits per number, sign included.
        count: How many numbers share a scale, the largest magnitude among them.

    Returns:
        Ascending numbers up to 1, the largest magnitude; multiples of `STOCHASTIC_UNIT`.
    """
    top = median_largest(count)
    steps = (1 << bits) - 1
    levels = [top * (2 * index / steps - 1) for index in range(steps + 1)]
    levels = descend(levels, _NORMAL.cdf, lambda x: -_NORMAL.pdf(x), _NORMAL.inv_cdf)
    return _rounded([level / top for level in levels[1 << (bits - 1) :]], STOCHASTIC_UNIT)


def median_largest(count: int) -> float:
    """Returns the median of the largest magnitude among `count` standard normal numbers."""
    return _NORMAL.inv_cdf((1 + 0.5 ** (1 / count)) / 2)


def descend(
    levels: list[float],
    share: Callable[[float], float],
    moment: Callable[[float], float],
    quantile: Callable[[float], float],
) -> list[float]:
    """Moves all levels but the first and the last to where stochastic rounding has the least variance.

    Args:
        levels: Ascending levels to begin with.
        share: The distribution function `F` of the numbers that are rounded; need not end at 1.
        moment: `x -> int x dF` up to `x`, from anywhere.
        quantile: The inverse of `share`.

    Returns:
        The levels after coordinate descent, which no sweep moves any more.
    """
    levels = list(levels)
    for _ in range(_SWEEPS):
        moved = 0.0
        for index in range(1, len(levels) - 1):
            a, c = levels[index - 1], levels[index + 1]
            if c <= a:
                continue
            wanted = (c * share(c) - a * share(a) - (moment(c) - moment(a))) / (c - a)
            level = min(max(quantile(wanted), a), c)
            moved = max(moved, abs(level - levels[index]))
            levels[index] = level
        if moved < _STILL:
            break
    return levels


def _borders(levels: list[float]) -> list[float]:
    return [0.0, *nearest_borders(tuple(levels)), float("inf")]


def _mean(low: float, high: float) -> float:
    """Returns the mean of a standard normal number between two borders."""
    above = 0.0 if high == float("inf") else _NORMAL.pdf(high)
    return (_NORMAL.pdf(low) - above) / (_NORMAL.cdf(high) - _NORMAL.cdf(low))


def _rounded(levels: list[float], unit: float) -> tuple[float, ...]:
    return tuple(round(level / unit) * unit for level in levels)
