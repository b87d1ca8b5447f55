"""How far a network's outputs are from those that it had before: Kullback-Leibler divergence."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

KEYS = ("logits", "out")
"""Where networks of other libraries keep their scores."""


def log_probabilities(output: object) -> Tensor | None:
    """Returns log-probabilities `[positions, classes]` float32 of a network's scores; None where it has none.

    Scores are a tensor with classes in dimension 1 (in the last one of three, as of sequences), alone, first
    in a tuple or list, or under `logits` or `out`. A single class tells nothing.
    """
    if isinstance(output, (tuple, list)) and output:
        return log_probabilities(output[0])
    for key in KEYS:
        found = output.get(key) if isinstance(output, Mapping) else getattr(output, key, None)
        if found is not None and not isinstance(output, Tensor):
            return log_probabilities(found)
    if not isinstance(output, Tensor) or not output.is_floating_point() or output.dim() < 2:
        return None
    classes = 2 if output.dim() == 3 else 1
    if output.shape[classes] < 2 or output.numel() == 0:
        return None
    return output.detach().float().movedim(classes, -1).flatten(0, -2).log_softmax(-1)


def divergence(before: Tensor, after: Tensor) -> float:
    """Returns the mean of `KL(before || after)` over positions, in nats.

    Args:
        before: Log-probabilities `[positions, classes]`.
        after: Likewise, in the same shape.
    """
    return float((before.exp() * (before - after)).sum(-1).mean())
