"""Which weights of a layer oscillate between two levels, how often, and where they are frozen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class OscillationTracker:
    """Follows the level index of every weight of a layer from optimizer step to optimizer step.

    A weight oscillates in a step in which its level changes in the direction opposite to its last change
    (Nagel et al. 2022). Its frequency is the exponential average of these events; a weight whose
    frequency exceeds a threshold is frozen at the rounded exponential average of its level, on one of the two
    levels between which it went last.

    Kept per weight, on its device: eleven bytes.

    Args:
        levels: Level index of every weight at the start, uint8, in the shape of the weight.
        num_levels: The number of levels, of which indices run from 0.

    Attributes:
        levels: Level index after the last step; of a frozen weight the level it is frozen at. uint8.
        direction: Sign of the last change of level, 0 before the first. int8.
        frequency: Exponential average of oscillations per step, 0 to 1; 0 of frozen weights. float32.
        mean: Exponential average of the level index. float32.
        frozen: Which weights are frozen. bool.
        any_frozen: Whether one is.
    """

    def __init__(self, levels: Tensor, num_levels: int) -> None:
        self.num_levels = num_levels
        self.levels = levels.clone()
        self.direction = torch.zeros_like(levels, dtype=torch.int8)
        self.frequency = torch.zeros_like(levels, dtype=torch.float32)
        self.mean = levels.float()
        self.frozen = torch.zeros_like(levels, dtype=torch.bool)
        self.any_frozen = False

    def update(self, levels: Tensor, momentum: float, threshold: float | None) -> None:
        """Takes the levels after an optimizer step.

        Args:
            levels: Level index of every weight, uint8; those of frozen weights are not read.
            momentum: Share of the new step in both averages, above 0 to 1.
            threshold: Frequency above which a weight is frozen from now on; None freezes none.
        """
        moved = levels != self.levels
        if self.any_frozen:
            moved &= ~self.frozen
        # Few weights change their level in a step: only they are looked at one by one.
        places = moved.flatten().nonzero().flatten()
        before, now = self.levels.flatten()[places], levels.flatten()[places]
        change = (now > before).to(torch.int8) - (now < before).to(torch.int8)
        turned = change * self.direction.flatten()[places] == -1
        self.direction.view(-1)[places] = change
        self.levels.view(-1)[places] = now
        self.frequency.mul_(1 - momentum).view(-1)[places] += momentum * turned
        self.mean.lerp_(self.levels.float(), momentum)
        if threshold is not None and bool(self.frequency.max() > threshold):
            self._freeze(self.frequency > threshold)

    def share_above(self, frequency: float) -> Tensor:
        """Returns the share of weights that oscillate more often than `frequency` and are not frozen, 0-d."""
        return (self.frequency > frequency).float().mean()

    def state_dict(self) -> dict[str, Tensor | int]:
        """Returns everything, for a checkpoint."""
        names = ("levels", "direction", "frequency", "mean", "frozen")
        return {"num_levels": self.num_levels, **{name: getattr(self, name).cpu() for name in names}}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], device: torch.device) -> OscillationTracker:
        """Returns a tracker that goes on where `state_dict` left off."""
        tracker = cls(state["levels"].to(device), state["num_levels"])
        for name in ("direction", "frequency", "mean", "frozen"):
            setattr(tracker, name, state[name].to(device).clone())
        tracker.any_frozen = bool(tracker.frozen.any())
        return tracker

    def _freeze(self, chosen: Tensor) -> None:
        # The average lags behind a weight that has wandered: the level is one of the last two in any case.
        here = self.levels.float()
        before = here - self.direction
        nearest = self.mean.clamp(torch.minimum(here, before), torch.maximum(here, before)).round()
        self.levels = torch.where(chosen, nearest.to(torch.uint8), self.levels)
        self.frequency.masked_fill_(chosen, 0.0)
        self.frozen |= chosen
        self.any_frozen = True
