r"""Error of rotated buckets: the variance bound, and the value for normally distributed coordinates.

Let `v` be a bucket of `d`, `u = H D v` its rotation with random signs `D`, and `s = ||v||` the root mean
square of `u`, since `||u||^2 = d ||v||^2`. Rotating is an isometry (times `sqrt(d)`), so the error of a
message relative to `||v||^2` is that of `u` relative to `||u||^2`.

Stochastic rounding. Group `g` of `n` coordinates is rounded between the levels `-1, .., -l, l, .., 1` times
its scale `m`. Let `w(r) = (c - |r|)(|r| - a)` be the variance of rounding `r` between its neighbours `a` and
`c`.

1. For every input and rotation the error is `sum m^2 w(u_i / m)`. Let `W` be the least concave function of
   `r^2` that is nowhere below `w`. By Jensen's inequality a bucket's error relative to `||u||^2` is at most
   `T W(1 / T)`, `T` the mean of `m^2` in units of `s^2`; this perspective of a concave function is concave
   and does not fall in `T`, so that `T` may be replaced by an upper bound of its expectation over rotations.
2. Every `u_i` is a sum of `d` numbers `+-v_j`, hence `P(|u_i| > t s) <= 2 exp(-t^2 / 2)` (Hoeffding), and the
   largest of `n` of them has `E max^2 <= s^2 int_0^inf min(1, 2 n exp(-t / 2)) dt = s^2 (2 ln(2 n) + 2)`.
3. A group's scale is its largest magnitude, rounded up to a multiple of the bucket's largest over 255. By
   Minkowski's inequality `sqrt(T) <= sqrt(2 ln(2 n) + 2) + sqrt(2 ln(2 d) + 2) / 255`.

Nearest levels with EDEN's scale. What is decoded is `v` plus an error orthogonal to `v`, for `S = ||u||^2 /
<u, q>` makes `<v, decoded> = ||v||^2`. Its relative square is `1 / cos^2 - 1`, `cos` the cosine of the angle
between `u` and its levels `q`. If `u` is normally distributed, `cos^2` tends to `1 - D` with the distortion
`D` of the Lloyd-Max levels (for them `E u q = E q^2 = 1 - D`), and the error to `D / (1 - D)`: 0.5708,
0.1331, 0.0358 and 0.0096 for 1 to 4 bits. The bound adds what a sum over `d` coordinates strays from its
mean, to first order `Var(u q) / (1 - D)^2` and likewise for the norms, at most `8 / d` of `1 + D / (1 - D)`.
It holds for rotations uniformly at random (Vargaftik et al., ICML 2022) and for Hadamard's wherever more than
a few coordinates hold the norm; two equal spikes are its worst case at 1 bit and reach 1 (Khintchine's
inequality with Szarek's constant), which therefore is the bound there.
"""

from __future__ import annotations

import functools
import itertools
import math
from statistics import NormalDist

from lightning_n2uq.ops.formats.rotated_codec import GROUP, RotatedFormat
from lightning_n2uq.ops.gaussian_levels import nearest_borders, nearest_levels

_NORMAL = NormalDist()


@functools.cache
def rotated_variance_bound(form: RotatedFormat) -> float:
    """Returns an upper bound `e` of `E||Q(v) - v||^2 <= e ||v||^2` (derivation in the module's docstring).

    Args:
        form: The bits, the bucket size and the rounding.

    Returns:
        The bound for a whole bucket, over rotations and rounding; a shorter one has a smaller error.
    """
    if not form.stochastic:
        if form.bits == 1:
            return 1.0
        limit = nearest_error(form.bits)
        return limit + 8 * (1 + limit) / form.bucket_size
    group = min(GROUP, form.bucket_size)
    spread = math.sqrt(_largest_square(group)) + math.sqrt(_largest_square(form.bucket_size)) / 255
    return _perspective(form.levels, min(spread**2, float(form.bucket_size)))


def nearest_error(bits: int) -> float:
    """Returns `D / (1 - D)`, the error with nearest levels of normally distributed coordinates."""
    levels = nearest_levels(bits)
    edges = [0.0, *nearest_borders(levels), math.inf]
    product = power = 0.0
    for level, (low, high) in zip(levels, itertools.pairwise(edges), strict=True):
        above = 0.0 if high == math.inf else _NORMAL.pdf(high)
        product += 2 * level * (_NORMAL.pdf(low) - above)
        power += 2 * level**2 * (_NORMAL.cdf(high) - _NORMAL.cdf(low))
    return power / product**2 - 1


def stochastic_error(levels: tuple[float, ...], top: float) -> float:
    """Returns the error with stochastic rounding of normally distributed coordinates.

    Args:
        levels: The positive levels, up to 1.
        top: What the highest stands for, in standard deviations; coordinates beyond it are left out.
    """
    reach = [top * level for level in levels]
    error = _segment(-reach[0], reach[0])
    return error + 2 * sum(_segment(a, c) for a, c in itertools.pairwise(reach))


def _segment(a: float, c: float) -> float:
    """Returns `int_a^c (c - x)(x - a) dPhi`."""
    mass = _NORMAL.cdf(c) - _NORMAL.cdf(a)
    first = _NORMAL.pdf(a) - _NORMAL.pdf(c)
    second = mass - (c * _NORMAL.pdf(c) - a * _NORMAL.pdf(a))
    return (a + c) * first - second - a * c * mass


def _largest_square(count: int) -> float:
    """Returns the bound of the expected largest square of `count` coordinates, in units of their mean."""
    return 2 * math.log(2 * count) + 2


def _perspective(levels: tuple[float, ...], spread: float) -> float:
    """Returns `T W(1 / T)`: the least value at `1 / T` of a line over `r^2` that lies nowhere below `w`."""
    at = 1 / spread
    points = [(r * r, _rounding_variance(levels, r)) for r in _grid(levels)]
    below = [(x, w) for x, w in points if x <= at]
    above = [(x, w) for x, w in points if x > at]
    chords = (w1 + (w2 - w1) * (at - x1) / (x2 - x1) for x1, w1 in below for x2, w2 in above)
    return spread * max(chords, default=max(w for x, w in points if x <= at)) * (1 + 1e-3)


def _grid(levels: tuple[float, ...]) -> list[float]:
    """Returns ratios from 0 to 1, the levels and the middles between them among them."""
    middles = [(a + c) / 2 for a, c in itertools.pairwise(levels)]
    return sorted({0.0, *levels, *middles, *(index / 400 for index in range(401))})


def _rounding_variance(levels: tuple[float, ...], ratio: float) -> float:
    for a, c in itertools.pairwise((-levels[0], *levels)):
        if ratio <= c:
            return (c - ratio) * (ratio - a)
    return 0.0
