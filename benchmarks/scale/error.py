"""Squared error of the averaged gradient against the number of ranks: measured with the codec, and expected.

With ``e1``, ``e2`` the relative errors of the two halves and ``g_i`` the ranks' gradients of mean ``m``:

    E ||result - m||^2 = e1 * mean ||g_i||^2 / W + e2 * E ||first mean||^2,
    E ||first mean||^2 = ||m||^2 + e1 * mean ||g_i||^2 / W

since the ranks round independently. The first term falls as ``1/W``; the second is left: the floor.
With few ranks the first mean still lies near the levels, where rounding again costs less: there the
formula, which takes ``e2`` from the true mean, is too high.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_n2uq.compression import ErrorFeedback, NUQCodec
from lightning_n2uq.compression.theory import variance_bound

RANKS = (2, 4, 8, 16, 32, 64)
VARIANTS: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "4 bits": ({"bits": 4}, {"bits": 4}),
    "4 bits, second_phase_bits 8": ({"bits": 4}, {"bits": 8}),
    "4 bits (float), second_phase_bits 8": (
        {"bits": 4, "levels": "float"},
        {"bits": 8, "levels": "float"},
    ),
    "4 bits, buckets of 256": ({"bits": 4, "bucket_size": 256}, {"bits": 4, "bucket_size": 256}),
    "3 bits": ({"bits": 3}, {"bits": 3}),
    "2 bits, linf, buckets of 256": (
        {"bits": 2, "bucket_size": 256, "norm": "linf"},
        {"bits": 2, "bucket_size": 256, "norm": "linf"},
    ),
    "8 bits (float)": ({"bits": 8, "levels": "float"}, {"bits": 8, "levels": "float"}),
}
"""Codec arguments of the first and the second half."""


def gradients(ranks: int, numel: int, noise: float, seed: int) -> Tensor:
    """Return ``[ranks, numel]`` Laplace gradients: a common part of unit variance and each rank's noise.

    Args:
        ranks: Number of rows.
        numel: Coordinates.
        noise: Variance of a rank's own part, in that of the common one.
        seed: Of both.
    """
    generator = torch.Generator().manual_seed(seed)

    def laplace(rows: int) -> Tensor:
        pair = [torch.empty(rows, numel).exponential_(generator=generator) for _ in range(2)]
        return (pair[0] - pair[1]) / 2**0.5

    return laplace(1) + noise**0.5 * laplace(ranks)


def exchange(rows: Tensor, first: NUQCodec, second: NUQCodec | None, seed: int) -> Tensor:
    """Return the mean that all ranks get; without a second half, the one before it."""
    numel = rows.shape[1]
    payloads = [first.encode(row, seed=1000 * seed + rank) for rank, row in enumerate(rows)]
    mean = first.decode_mean(payloads, numel)
    if second is None:
        return mean
    return second.decode(second.encode(mean, seed=-1 - seed), numel)


def measure(
    name: str, ranks: int, noise: float = 1.0, numel: int = 1 << 16, trials: int = 4
) -> dict[str, float]:
    """Return the relative squared errors ``||result - m||^2 / ||m||^2``: both halves, the first alone.

    ``expected`` is the formula of the module with the codecs' measured single errors, ``bound`` with
    their variance bounds.
    """
    first, second = (NUQCodec(**arguments) for arguments in VARIANTS[name])
    rows = gradients(ranks, numel, noise, seed=ranks)
    mean = rows.mean(0)
    scale, spread = float(mean.square().sum()), float(rows.square().sum() / ranks)
    both = half = 0.0
    for trial in range(trials):
        half += float((exchange(rows, first, None, trial) - mean).square().sum()) / scale / trials
        both += float((exchange(rows, first, second, trial) - mean).square().sum()) / scale / trials
    single = [_single(codec, row) for codec, row in ((first, rows[0]), (second, mean))]
    return {
        "ranks": ranks,
        "both": both,
        "first": half,
        "expected": _formula(*single, spread / scale / ranks),
        "bound": _formula(variance_bound(first.form), variance_bound(second.form), spread / scale / ranks),
    }


def _formula(first: float, second: float, spread: float) -> float:
    return first * spread + second * (1 + first * spread)


def _single(codec: NUQCodec, row: Tensor) -> float:
    wrong = codec.decode(codec.encode(row, seed=12345), row.numel()) - row
    return float(wrong.square().sum() / row.square().sum())


def feedback_error(steps: int, feedback: bool, ranks: int = 8, numel: int = 1 << 15) -> float:
    """Return the relative squared error of the sum of ``steps`` equal exchanges in 4 bits.

    Without feedback errors of steps are independent and the error falls as ``1/steps``; with it the sum
    misses only the last residuals, and the error falls as ``1/steps^2``.
    """
    codec = NUQCodec(bits=4)
    rows = gradients(ranks, numel, 1.0, seed=7)
    owed = ErrorFeedback()
    total = torch.zeros(numel)
    for step in range(steps):
        if feedback:
            sent = [owed.encode(codec, rank, row, 100 * step + rank) for rank, row in enumerate(rows)]
            mean = codec.decode_mean(sent, numel)
            total += codec.decode(owed.encode(codec, "mean", mean, -1 - step), numel)
        else:
            total += exchange(rows, codec, codec, step)
    wanted = rows.mean(0)
    return float((total / steps - wanted).square().sum() / wanted.square().sum())


def table() -> dict[str, object]:
    """Return all measured errors, as they are saved."""
    curves = {name: [measure(name, ranks) for ranks in RANKS] for name in VARIANTS}
    steps = (1, 4, 16, 64)
    feedback = {
        name: [feedback_error(count, on) for count in steps] for name, on in (("off", False), ("on", True))
    }
    return {"noise": 1.0, "curves": curves, "feedback": {"steps": list(steps), **feedback}}
