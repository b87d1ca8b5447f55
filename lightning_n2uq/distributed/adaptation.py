"""Levels that follow the gradients (ALQ, AMQ), the same on all ranks.

Every so many steps each rank counts the magnitudes of its own gradients, before they are exchanged. When the
step's last gradient is back, the counts are summed over the ranks, every codec adapts, and the first rank's
levels go to all. Nothing is encoded meanwhile, so that all messages of a step have the same levels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_n2uq.compression import AdaptiveCodec, Codec


class LevelAdaptation:
    """Adapts the codecs of an exchange.

    Args:
        codecs: The codecs of the phases; those that do not adapt are left alone.
        every: The number of steps from one adaptation to the next; the first step is one of them.
        first: The first step that is compressed.
    """

    def __init__(self, codecs: Sequence[Codec], every: int, first: int) -> None:
        self.codecs = [codec for codec in codecs if isinstance(codec, AdaptiveCodec)]
        self._every, self._first = every, first
        self._counts: Tensor | None = None
        self._futures: list[torch.futures.Future[Tensor]] = []

    def due(self, step: int) -> bool:
        """Returns whether levels are estimated from the gradients of a step."""
        return bool(self.codecs) and step >= self._first and (step - self._first) % self._every == 0

    def observe(self, gradients: Sequence[Tensor]) -> None:
        """Counts the magnitudes of a bucket's gradients, those that travel in full precision left out."""
        if gradients:
            counts = self.codecs[0].observe(torch.cat([g.reshape(-1).float() for g in gradients]))
            self._counts = counts if self._counts is None else self._counts + counts

    def await_bucket(
        self, future: torch.futures.Future[Tensor], last: bool, group: dist.ProcessGroup | None
    ) -> None:
        """Notes a bucket that is being exchanged; after the step's last, adapts. All ranks have to call.

        Args:
            future: Completes when the bucket is back.
            last: Whether it is the step's last bucket.
            group: The ranks that exchange.
        """
        self._futures.append(future)
        if last:
            futures, self._futures = self._futures, []
            for one in futures:
                one.wait()
            counts = self.take_counts()
            if counts is not None:
                self._adapt(counts, group)

    def take_counts(self) -> Tensor | None:
        """Returns what was counted since the last call; None if nothing was."""
        counts, self._counts = self._counts, None
        return counts

    def adapt(self, counts: Tensor) -> None:
        """Adapts every codec to counts of all ranks."""
        for codec in self.codecs:
            codec.adapt(counts)

    def _adapt(self, counts: Tensor, group: dist.ProcessGroup | None) -> None:
        dist.all_reduce(counts, group=group)
        root = dist.get_process_group_ranks(group)[0]
        self.adapt(counts)
        for codec in self.codecs:
            levels = torch.tensor(codec.levels, dtype=torch.float64, device=counts.device)
            dist.broadcast(levels, src=root, group=group)  # another processor may round otherwise
            codec.levels = levels.tolist()

    def state(self) -> list[list[float]]:
        """Returns the levels of every codec."""
        return [list(codec.levels) for codec in self.codecs]

    def restore(self, levels: Sequence[Sequence[float]]) -> None:
        """Sets what `state` returned; other codecs than then keep their levels."""
        for codec, saved in zip(self.codecs, levels, strict=False):
            if len(saved) == len(codec.levels):
                codec.levels = list(saved)
