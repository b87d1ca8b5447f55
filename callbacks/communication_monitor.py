"""The cost of gradient synchronisation, and whether compression paid off."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy
from lightning_utilities.core.rank_zero import rank_zero_info
from torch.optim import Optimizer

from lightning_n2uq.callbacks._common import log_sink
from lightning_n2uq.distributed import ExchangeConfig
from lightning_n2uq.distributed.collectives import time_all_reduce
from lightning_n2uq.distributed.stats import ExchangeStats, StepStats
from lightning_n2uq.scaling.recorder import Recorder
from lightning_n2uq.strategies.nuqsgd import NUQSGDStrategy
from lightning_n2uq.strategies.sharded import ShardedNUQSGDStrategy
from lightning_n2uq.utils.validation import check_integer

_COUNTING = (NUQSGDStrategy, ShardedNUQSGDStrategy)
_TOTALS = ("coordinates", "sent_bytes", "full_bytes", "sync_s", "nonfinite")


class CommunicationMonitor(pl.Callback):
    """Logs bytes, times and errors of compressed gradient exchange under `comm/`.

    Bytes are counted where they are handed to the collectives. Per logged step: `sent_bytes`,
    `ratio` (an fp32 all-reduce's bytes over ours), `encode_s`, `exchange_s`, `decode_s`,
    `sync_s`, `relative_error` (squared, of what rank 0 sent) and `nonfinite_buckets`.
    After the fit one line says whether compression paid off on this network, which it finds out by
    timing one fp32 all-reduce that sends as many bytes as full precision does. With `nuqsgd_local` the
    figures are those of a round; with `nuqsgd_fsdp` bytes are those of all collectives, gathered parameters
    included, and `ratio` compares them with FSDP2's.

    For `n2uq advise` it measures, with plain `ddp` too, the time of a step, the speed of the link and what
    each codec would lose of the gradients of a logged step (on rank 0, on 131,072 coordinates).

    Args:
        every_n_steps: Optimizer steps between two logs; measuring the error costs one decode.

    Attributes:
        summary: That line, once the fit has ended.

    Raises:
        ValueError: `every_n_steps` is below 1.
        MisconfigurationException: The trainer's strategy is neither of ours nor DDP.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        self.every_n_steps = check_integer("every_n_steps", every_n_steps, 1)
        self.summary = ""
        self._seen = -1
        self._total = StepStats()
        self._steps = 0
        self._recorder, self._looked = Recorder(), -1
        self._figures: dict[str, float] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuses strategies that count nothing."""
        if stage == "fit" and not isinstance(trainer.strategy, DDPStrategy | ShardedNUQSGDStrategy):
            name = type(trainer.strategy).__name__
            raise MisconfigurationException(
                f"CommunicationMonitor needs a nuqsgd strategy or ddp, got {name}"
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Switches the counters on; a single process has nothing to count."""
        strategy = trainer.strategy
        per_node = trainer.world_size // trainer.num_nodes
        config = strategy.config if isinstance(strategy, _COUNTING) else ExchangeConfig()
        self._recorder.start(pl_module, strategy.root_device, per_node, config, _period(trainer))
        stats = _stats(trainer)
        if stats is not None:
            stats.watch, stats.measure_every = True, max(1, self.every_n_steps // _period(trainer))

    def on_train_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,  # noqa: ANN401  # Lightning's signature
        batch_idx: int,
    ) -> None:
        """Starts the clock of steps."""
        self._recorder.begin_batch()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Looks at the gradients of a step that is logged; no rank has whole ones where they are sharded."""
        looks = trainer.is_global_zero and isinstance(trainer.strategy, DDPStrategy)
        if looks and trainer.global_step % self.every_n_steps == 0:
            self._recorder.look_at(pl_module.parameters(), _own_norm_sq(trainer))

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stops the clock of steps."""
        self._recorder.pause()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stops the clock of steps."""
        self._recorder.pause()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,  # noqa: ANN401  # Lightning's signature
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        """Logs the step's figures, if gradients were synchronised in this batch."""
        self._recorder.end_batch(trainer.global_step)
        last = self._collect(trainer)
        if last is not None or (_stats(trainer) is None and self._is_due(trainer)):
            self._note(trainer, last)
            metrics = self._figures
            pl_module.log_dict(metrics, on_step=True, on_epoch=False, logger=False, rank_zero_only=True)

    def _note(self, trainer: pl.Trainer, last: StepStats | None) -> None:
        """Sends the figures to the loggers, whatever the trainer's `log_every_n_steps`."""
        self._figures |= {**({} if last is None else figures(last)), **self._recorder.metrics()}
        log_sink.log_metrics(trainer, self._figures)

    def _is_due(self, trainer: pl.Trainer) -> bool:
        """Returns whether a step without counters is to be logged, once each."""
        due = (trainer.global_step - 1) % self.every_n_steps == 0 and trainer.global_step != self._looked
        self._looked = trainer.global_step
        return due

    def _collect(self, trainer: pl.Trainer) -> StepStats | None:
        """Adds an exchange that has ended since the last call; returns it if it is to be logged."""
        stats = _stats(trainer)
        if stats is None or stats.last is None or stats.last.step == self._seen:
            return None
        last = stats.last
        self._seen = last.step
        self._add(last)
        return last if stats.measures(last.step) else None

    def _add(self, step: StepStats) -> None:
        self._steps += 1
        for name in _TOTALS:
            setattr(self._total, name, getattr(self._total, name) + getattr(step, name))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Logs the last figures, times one fp32 all-reduce (of all ranks) and prints the line on rank 0."""
        last = self._collect(trainer)  # a round that the end of training has ended
        if last is not None or self._figures:
            self._note(trainer, last)  # the time of a step is known by now
        if self._steps:
            ranks = max(2, trainer.world_size)
            # The all-reduce that sends as many bytes: of the gradient, with FSDP also of gathered parameters.
            coordinates = round(self._total.full_bytes / self._steps * ranks / (8 * (ranks - 1)))
            full_seconds = time_all_reduce(coordinates, trainer.strategy.root_device)
            self.summary = verdict(self._total, self._steps, full_seconds, _period(trainer))
            rank_zero_info(f"{self.summary}; `n2uq advise RUN` says what other methods would cost here")

    def state_dict(self) -> dict[str, Any]:
        """Returns the totals, and the latest figures for `n2uq advise`."""
        totals = {"steps": self._steps, **{name: getattr(self._total, name) for name in _TOTALS}}
        return totals | ({"figures": self._figures | self._recorder.metrics()} if self._figures else {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues the totals."""
        self._steps = state_dict["steps"]
        self._total = StepStats(**{name: state_dict[name] for name in _TOTALS})


def _stats(trainer: pl.Trainer) -> ExchangeStats | None:
    strategy = trainer.strategy
    return strategy.state.stats if isinstance(strategy, _COUNTING) and strategy.state is not None else None


def _own_norm_sq(trainer: pl.Trainer) -> float:
    """Returns the squared norm of this rank's own gradient in the step just averaged, 0 if unknown."""
    strategy, stats = trainer.strategy, _stats(trainer)
    scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
    if stats is None or stats.last is None or scaled or not isinstance(strategy, NUQSGDStrategy):
        return 0.0
    whole = strategy.steps_per_exchange == 1 and not strategy.config.hierarchical
    return stats.last.norm_sq if whole else 0.0


def _period(trainer: pl.Trainer) -> int:
    """Returns the optimizer steps between two exchanges."""
    strategy = trainer.strategy
    return strategy.steps_per_exchange if isinstance(strategy, NUQSGDStrategy) else 1


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


def verdict(total: StepStats, exchanges: int, full_seconds: float, period: int = 1) -> str:
    """Returns one line that says whether the exchange takes less time than fp32 all-reduces.

    Args:
        total: The sums over the exchanges.
        exchanges: The number of exchanges.
        full_seconds: The measured time of one fp32 all-reduce of the gradient, in seconds.
        period: The optimizer steps between two exchanges, each of which would take an all-reduce.
    """
    steps = exchanges * period
    ours, full_bytes = total.sync_s / steps, total.full_bytes / exchanges
    outcome = "paid off" if ours < full_seconds else "did not pay off"
    rounds = f" (one exchange every {period})" if period > 1 else ""
    unit = ("round" if period > 1 else "step") + "s" * (exchanges != 1)
    return (
        f"Gradient compression {outcome} on this network: {total.sent_bytes / steps / 1e6:.3g} MB and "
        f"{ours:.3g} s per step{rounds}, against {full_bytes / 1e6:.3g} MB and {full_seconds:.3g} s in fp32 "
        f"({full_seconds / ours:.2g} times as long, at {full_bytes * 8e-6 / full_seconds:.3g} Mbit/s); "
        f"{int(total.nonfinite)} non-finite buckets in {exchanges} {unit}"
    )
