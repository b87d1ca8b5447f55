"""The cost of gradient synchronisation, and whether compression paid off."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_n2uq.distributed.collectives import time_all_reduce
from lightning_n2uq.distributed.stats import ExchangeStats, StepStats
from lightning_n2uq.strategies.nuqsgd import NUQSGDStrategy
from lightning_n2uq.utils.validation import check_integer

_TOTALS = ("coordinates", "sent_bytes", "full_bytes", "sync_s", "nonfinite")


class CommunicationMonitor(pl.Callback):
    """Logs bytes, times and errors of compressed gradient exchange under `comm/`.

    Bytes are counted where they are handed to the collectives. Per logged step: `sent_bytes`,
    `ratio` (an fp32 all-reduce's bytes over ours), `encode_s`, `exchange_s`, `decode_s`,
    `sync_s`, `relative_error` (squared, of what rank 0 sent) and `nonfinite_buckets`.
    After the fit one line says whether compression paid off on this network, which it finds out by
    timing one fp32 all-reduce of the gradient's size.

    Args:
        every_n_steps: Optimizer steps between two logs; measuring the error costs one decode.

    Attributes:
        summary: That line, once the fit has ended.

    Raises:
        ValueError: `every_n_steps` is below 1.
        MisconfigurationException: The trainer's strategy is not a `NUQSGDStrategy`.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        self.every_n_steps = check_integer("every_n_steps", every_n_steps, 1)
        self.summary = ""
        self._seen = -1
        self._total = StepStats()
        self._steps = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuses strategies that count nothing."""
        if stage == "fit" and not isinstance(trainer.strategy, NUQSGDStrategy):
            raise MisconfigurationException(
                f"CommunicationMonitor needs a nuqsgd strategy, got {type(trainer.strategy).__name__}"
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Switches the counters on; a single process has nothing to count."""
        stats = _stats(trainer)
        if stats is not None:
            stats.watch, stats.measure_every = True, self.every_n_steps

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,  # noqa: ANN401  # Lightning's signature
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        """Logs the step's figures, if gradients were synchronised in this batch."""
        stats = _stats(trainer)
        if stats is None or stats.last is None or stats.last.step == self._seen:
            return
        last = stats.last
        self._seen = last.step
        self._add(last)
        if stats.measures(last.step):
            pl_module.log_dict(figures(last), on_step=True, on_epoch=False, rank_zero_only=True)

    def _add(self, step: StepStats) -> None:
        self._steps += 1
        for name in _TOTALS:
            setattr(self._total, name, getattr(self._total, name) + getattr(step, name))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Times one fp32 all-reduce (all ranks take part) and print the line on rank 0."""
        if self._steps:
            coordinates = self._total.coordinates // self._steps
            full_seconds = time_all_reduce(coordinates, trainer.strategy.root_device)
            self.summary = verdict(self._total, self._steps, full_seconds)
            rank_zero_info(self.summary)

    def state_dict(self) -> dict[str, Any]:
        """Returns the totals."""
        return {"steps": self._steps, **{name: getattr(self._total, name) for name in _TOTALS}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues the totals."""
        self._steps = state_dict["steps"]
        self._total = StepStats(**{name: state_dict[name] for name in _TOTALS})


def _stats(trainer: pl.Trainer) -> ExchangeStats | None:
    strategy = trainer.strategy
    return (
        strategy.state.stats if isinstance(strategy, NUQSGDStrategy) and strategy.state is not None else None
    )


def figures(step: StepStats) -> Mapping[str, float]:
    """Returns what is logged about one step."""
    found = {
        "comm/sent_bytes": float(step.sent_bytes),
        "comm/ratio": step.full_bytes / max(1, step.sent_bytes),
        "comm/encode_s": step.encode_s,
        "comm/exchange_s": step.exchange_s,
        "comm/decode_s": step.decode_s,
        "comm/sync_s": step.sync_s,
        "comm/nonfinite_buckets": float(step.nonfinite),
    }
    if step.relative_error is not None:
        found["comm/relative_error"] = step.relative_error
    return found


def verdict(total: StepStats, steps: int, full_seconds: float) -> str:
    """Returns one line that says whether the exchange takes less time than an fp32 all-reduce.

    Args:
        total: The sums over the steps.
        steps: The number of steps.
        full_seconds: The measured time of one fp32 all-reduce of the gradient, in seconds.
    """
    ours, full_bytes = total.sync_s / steps, total.full_bytes / steps
    outcome = "paid off" if ours < full_seconds else "did not pay off"
    return (
        f"Gradient compression {outcome} on this network: {total.sent_bytes / steps / 1e6:.3g} MB and "
        f"{ours:.3g} s per step, against {full_bytes / 1e6:.3g} MB and {full_seconds:.3g} s in fp32 "
        f"({full_seconds / ours:.2g} times as long, at {full_bytes * 8e-6 / full_seconds:.3g} Mbit/s); "
        f"{int(total.nonfinite)} non-finite buckets in {steps} steps"
    )
