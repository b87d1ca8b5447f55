"""Stratified, seeded, disjoint index sets."""

import torch
from torch import Tensor


def stratified_split(labels: Tensor, fractions: tuple[float, ...], seed: int) -> list[Tensor]:
    """Cuts the indices of `labels` into parts that all have the classes' proportions.

    Each class's members are permuted and cut. The cuts are those of the whole, class after class, rounded
    down: so the parts' sizes are exact, and each class is within one image of its share at every cut.

    Args:
        labels: The class of every image, `[N]` int64.
        fractions: The share of each part, above 0, with a sum of at most 1; the rest is in no part.
        seed: The seed of the permutations.

    Returns:
        One sorted `[n]` int64 tensor of indices per fraction; they are disjoint.

    Raises:
        ValueError: A fraction is out of range, or their sum is above 1.
    """
    if any(not fraction > 0 for fraction in fractions) or sum(fractions) > 1 + 1e-9:
        raise ValueError(f"fractions: got {fractions}, allowed are shares above 0, together at most 1")
    generator = torch.Generator().manual_seed(seed)
    shares = [sum(fractions[:count]) for count in range(len(fractions) + 1)]
    parts: list[list[Tensor]] = [[] for _ in fractions]
    before = 0
    for label in sorted(set(labels.tolist())):
        members = (labels == label).nonzero()[:, 0]
        members = members[torch.randperm(len(members), generator=generator)]
        cuts = [_cut(share, before + len(members)) - _cut(share, before) for share in shares]
        before += len(members)
        for part, low, high in zip(parts, cuts[:-1], cuts[1:], strict=True):
            part.append(members[low:high])
    return [torch.cat(part).sort().values for part in parts]


def _cut(share: float, count: int) -> int:
    return int(share * count + 1e-6)  # 1e-6: 0.7 + 0.1 + 0.2 is a little below 1
