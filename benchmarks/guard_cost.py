"""Share of training time that `NonFiniteGuard` takes on the digits: ``python -m benchmarks.guard_cost``.

Processor time of the training thread inside the guard's hooks, over that of all training batches: a machine
that is busy with other work changes both alike.
"""

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from lightning_n2uq.callbacks import NonFiniteGuard
from lightning_n2uq.datamodules import DigitsDataModule
from lightning_n2uq.modules import QuantizedClassifier

HOOKS = (
    "on_train_batch_start",
    "on_before_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_validation_start",
    "on_save_checkpoint",
    "on_train_end",
)


class Clock(Callback):
    """Processor time of every batch after the first `skip`, and of a callback's hooks within."""

    def __init__(self, watched: Callback, skip: int) -> None:
        self.skip, self.inside, self.hooks = skip, 0.0, 0.0
        self.start = self.total = 0.0
        for name in HOOKS:
            setattr(watched, name, self._timed(getattr(watched, name)))

    def _timed(self, hook: Callable[..., None]) -> Callable[..., None]:
        def timed(*arguments: Any, **keywords: Any) -> None:
            start = time.thread_time()
            hook(*arguments, **keywords)
            self.hooks += time.thread_time() - start

        return timed

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Starts after compilation and warm-up."""
        if trainer.global_step == self.skip:
            self.start, self.hooks = time.thread_time(), 0.0
        self.total = time.thread_time() - self.start


def measure(action: str, steps: int, skip: int) -> tuple[float, float]:
    """Milliseconds of a step, and of the guard in it."""
    seed_everything(0, verbose=False)
    data = DigitsDataModule(batch_size=64)
    model = QuantizedClassifier("resnet20", 10, 1, 8, weight_bits=2, activation_bits=2)
    guard = NonFiniteGuard(input=action, loss=action, gradient=action)  # type: ignore[arg-type]
    clock = Clock(guard, skip)
    Trainer(
        accelerator="cpu", devices=1, max_steps=skip + steps, limit_val_batches=0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[guard, clock],
    ).fit(model, data)  # fmt: skip
    return 1e3 * clock.total / steps, 1e3 * clock.hooks / steps


def main() -> None:
    """Prints one row for each action."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--skip", type=int, default=20)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print("action  step [ms]  guard [ms]  share")
    for action in ("stop", "skip"):
        step, guard = measure(action, options.steps, options.skip)
        print(f"{action:<6}  {step:9.2f}  {guard:10.3f}  {guard / step:.2%}")


if __name__ == "__main__":
    main()
