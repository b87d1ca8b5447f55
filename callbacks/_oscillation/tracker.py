"""Which weights of a layer oscillate between two levels, how often, and where they are frozen."""

from __future__ import annotations

import torch
from torch import Tensor


class OscillationTracker:
    """Follows the level index of every weight of a layer from optimizer step to optimizer step.

    A weight oscillates in a step in which its level changes in the direction opposite to its last change
    (Nagel et al. 2022, section 4). Its frequency is the exponential average of these events; a weight whose
    frequency exceeds a threshold is frozen at the rounded exponential average of its level, on one of the two
    levels between which it went last.

    Kept per weight, on its device: eleven bytes, and its value where it is frozen.

    Args:
        weight: The weights at the start, floating.
        levels: Their level indices, uint8, in the same shape.
        num_levels: The number of levels, of which indices run from 0.

    Attributes:
        levels: Level index after the last step; of a frozen weight the level it is frozen at. uint8.
        direction: Sign of the last change of level, 0 before the first. int8.
        frequency: Exponential average of oscillations per step, 0 to 1. float32.
        mean: Exponential average of the level index. float32.
        frozen: Which weights are frozen. bool.
        value: What frozen weights are held at; of the others a value of no meaning. Dtype of the weight.
    """

    def __init__(self, weight: Tensor, levels: Tensor, num_levels: int) -> None:
        self.num_levels = num_levels
        self.levels = levels.clone()
        self.direction = torch.zeros_like(levels, dtype=torch.int8)
        self.frequency = torch.zeros_like(levels, dtype=torch.float32)
        self.mean = levels.float()
        self.frozen = torch.zeros_like(levels, dtype=torch.bool)
        self.value = weight.detach().clone()

    def update(self, levels: Tensor, momentum: float, threshold: float | None) -> None:
        """Takes the levels after an optimizer step.

        Args:
            levels: Level index of every weight, uint8; those of frozen weights are not read.
            momentum: Share of the new step in both averages, above 0 to 1.
            threshold: Frequency above which a weight is frozen from now on; None freezes none.
        """
        now = torch.where(self.frozen, self.levels, levels)
        moved = torch.sign(now.to(torch.int16) - self.levels).to(torch.int8)
        turned = moved * self.direction == -1
        self.frequency.lerp_(turned.float(), momentum)
        self.mean.lerp_(now.float(), momentum)
        self.direction = torch.where(moved == 0, self.direction, moved)
        self.levels = now
        if threshold is not None:
            self._freeze((self.frequency > threshold) & ~self.frozen)

    def share_above(self, frequency: float) -> Tensor:
        """Returns the share of weights that oscillate more often than `frequency` and are not frozen, 0-d."""
        return ((self.frequency > frequency) & ~self.frozen).float().mean()

    def state_dict(self) -> dict[str, Tensor | int]:
        """Returns everything, for a checkpoint."""
        names = ("levels", "direction", "frequency", "mean", "frozen", "value")
        return {"num_levels": self.num_levels, **{name: getattr(self, name).cpu() for name in names}}

    @classmethod
    def from_state(cls, state: dict[str, Tensor | int], device: torch.device) -> OscillationTracker:
        """Returns a tracker that goes on where `state_dict` left off."""
        tracker = cls.__new__(cls)
        for name, value in state.items():
            setattr(tracker, name, value.to(device) if isinstance(value, Tensor) else value)
        return tracker

    def _freeze(self, chosen: Tensor) -> None:
        # The average lags behind a weight that has wandered: the level is one of the last two in any case.
        here = self.levels.float()
        before = here - self.direction
        nearest = self.mean.clamp(torch.minimum(here, before), torch.maximum(here, before)).round()
        self.levels = torch.where(chosen, nearest.to(torch.uint8), self.levels)
        self.frozen |= chosen
