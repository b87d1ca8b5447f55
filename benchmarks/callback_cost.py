"""Share of training time that callbacks take on the digits: ``python -m benchmarks.callback_cost``.

Processor time of the training thread inside a callback's hooks, over that of all training batches: a machine
that is busy with other work changes both alike.
"""

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from lightning_n2uq.callbacks import NonFiniteGuard, OscillationControl, QuantizationMonitor
from lightning_n2uq.datamodules import DigitsDataModule
from lightning_n2uq.modules import QuantizedClassifier

HOOKS = (
    "on_train_batch_start",
    "on_before_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)

CALLBACKS: dict[str, Callable[[], Callback]] = {
    "NonFiniteGuard, stop": lambda: NonFiniteGuard(input="stop", loss="stop", gradient="stop"),
    "NonFiniteGuard, skip": lambda: NonFiniteGuard(input="skip", loss="skip", gradient="skip"),
    "OscillationControl": lambda: OscillationControl(start=0, momentum=0.005),
    "QuantizationMonitor": QuantizationMonitor,
}
"""What is measured, with the options of a usual run."""


class Clock(Callback):
    """Processor time of every batch after the first `skip`, and of a callback's hooks within."""

    def __init__(self, watched: Callback, skip: int) -> None:
        self.skip, self.hooks = skip, 0.0
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


def measure(build: Callable[[], Callback], steps: int, skip: int) -> tuple[float, float]:
    """Milliseconds of a step, and of the callback in it."""
    seed_everything(0, verbose=False)
    data = DigitsDataModule(batch_size=64)
    model = QuantizedClassifier("resnet20", 10, 1, 8, weight_bits=2, activation_bits=2)
    callback = build()
    clock = Clock(callback, skip)
    with tempfile.TemporaryDirectory() as folder:
        _train(model, data, [callback, clock], skip + steps, folder)
    return 1e3 * clock.total / steps, 1e3 * clock.hooks / steps


def _train(
    model: LightningModule, data: DigitsDataModule, callbacks: list[Callback], steps: int, folder: str
) -> None:
    Trainer(
        accelerator="cpu", devices=1, max_steps=steps, limit_val_batches=0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=callbacks, default_root_dir=folder,
    ).fit(model, data)  # fmt: skip


def main() -> None:
    """Prints a row for each callback."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--skip", type=int, default=20)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print("| callback | step [ms] | callback [ms] | share |\n|---|---|---|---|")
    for name, build in CALLBACKS.items():
        step, callback = measure(build, options.steps, options.skip)
        print(f"| {name} | {step:.2f} | {callback:.3f} | {callback / step:.2%} |")


if __name__ == "__main__":
    main()
