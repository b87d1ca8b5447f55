"""Lightning's finders, which change a run after its schedule and its config were made."""

from __future__ import annotations

from collections.abc import Iterable

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder

from lightning_n2uq.utils.compat_lightning import exits_early


def refuse_finders(callbacks: Iterable[Callback]) -> None:
    """Refuses a finder that would go on into a training run.

    A found batch size would leave the schedule at the number of steps of the old one, a found rate would hold
    for one step, until the schedule sets the rate again, and the saved config would tell neither. A `Tuner`
    ends after its search: what it finds is in the model or the data module before the run begins.

    Raises:
        ValueError: A callback is a finder that does not end after its search.
    """
    for finder, argument in ((BatchSizeFinder, "data.batch_size"), (LearningRateFinder, "model.lr")):
        if any(isinstance(callback, finder) and not exits_early(callback) for callback in callbacks):
            raise ValueError(
                f"trainer.callbacks: got {finder.__name__}, allowed is {argument} itself: search with "
                "lightning.pytorch.tuner.Tuner first, since schedule and config are made before the search"
            )
