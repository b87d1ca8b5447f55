"""Training as on several ranks that compress their gradients, in one process on one device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn

from lightning_n2uq.callbacks._common import log_sink
from lightning_n2uq.callbacks.communication_monitor import figures
from lightning_n2uq.compression import CODECS, IdentityCodec
from lightning_n2uq.distributed import ExchangeConfig
from lightning_n2uq.distributed.simulation import SimulatedExchange
from lightning_n2uq.distributed.stats import ExchangeStats
from lightning_n2uq.utils.compat import copy_each
from lightning_n2uq.utils.validation import check, check_choice, check_integer


class SimulatedRanks(Callback):
    """Trains as `ranks` processes with a strategy of this project would, in one process.

    Says what a compression does to accuracy before any machine is rented, and how many bytes a rank would
    send; says nothing of seconds. Each batch of the data module is one rank's batch: `ranks` of them make one
    optimizer step (`accumulate_grad_batches` is set), their gradients go through the strategy's exchange,
    with each rank's own random numbers and residuals, and the step is taken with the mean that every rank
    would get. As in DDP, every rank's forward pass starts from the first rank's buffers (running statistics).
    Where an epoch ends within a step, ranks without a batch repeat the others' gradients, as
    `DistributedSampler` repeats images.

    What differs from real ranks: which images share a batch, one stream of random numbers (augmentation,
    dropout), and for networks over 1 MiB where DDP's buckets end (see `SimulatedExchange`). Metrics are those
    of all batches.

    Args:
        ranks: The number of ranks, 2 or more.
        strategy: `ddp` (the exact mean), or the name of a compressing strategy, such as `nuqsgd` or
            `nuqsgd_rotated_2bit`.
        settings: Fields of `ExchangeConfig` that replace those of the name, for example `{bits: 2}`.
        every_n_steps: Optimizer steps between two logs of `comm/sent_bytes`, `comm/ratio` and
            `comm/relative_error` (squared, of what the first rank sent; it costs one decoding).

    Raises:
        ValueError: An argument is not allowed, or the run has a strategy of its own, accumulates gradients by
            itself or optimizes manually.
    """

    def __init__(
        self,
        ranks: int = 4,
        strategy: str = "nuqsgd",
        settings: Mapping[str, Any] | None = None,
        every_n_steps: int = 50,
    ) -> None:
        self.ranks = check_integer("ranks", ranks, 2)
        self.every_n_steps = check_integer("every_n_steps", every_n_steps, 1)
        self.strategy = check_choice("strategy", strategy, ("ddp", *CODECS))
        self._arguments = _exchange_arguments(strategy, settings or {})
        self.exchange: SimulatedExchange | None = None
        self._saved: dict[str, Any] | None = None
        self._stats: ExchangeStats | None = None
        self._parameters: list[nn.Parameter] = []
        self._gradients: list[list[Tensor | None]] = []
        self._buffers: list[Tensor] = []
        self._before: list[Tensor] = []  # the buffers before the step
        self._first: list[Tensor] = []  # those of the first rank after it
        self._ends_step = False

    def state_dict(self) -> dict[str, Any]:
        """Returns the ranks' step counters, levels, residuals; within a step also what ranks have so far."""
        if self.exchange is None:
            return {}
        state = self.exchange.state_dict()
        if self._gradients:
            state["step"] = {"gradients": self._gradients, "before": self._before, "first": self._first}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from them once training starts."""
        self._saved = state_dict or None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Makes one optimizer step of `ranks` batches."""
        if stage != "fit":
            return
        if not isinstance(trainer.strategy, SingleDeviceStrategy):
            raise ValueError(
                f"strategy: got {type(trainer.strategy).__name__} on {trainer.world_size} devices, allowed "
                "with SimulatedRanks is `auto` with one device, which stands for all ranks"
            )
        if trainer.accumulate_grad_batches not in (1, self.ranks) or any(
            isinstance(other, GradientAccumulationScheduler) for other in _callbacks(trainer)
        ):
            raise ValueError(
                "accumulate_grad_batches: allowed with SimulatedRanks is 1, or its number of ranks; a step "
                "takes one batch from every rank"
            )
        if not pl_module.automatic_optimization:
            raise ValueError("automatic_optimization: got False, allowed with SimulatedRanks is True")
        trainer.accumulate_grad_batches = self.ranks

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes the ranks."""
        self._parameters = [parameter for parameter in pl_module.parameters() if parameter.requires_grad]
        self.exchange = SimulatedExchange(self.ranks, pl_module, **self._arguments)
        self._stats = self.exchange.connect(pl_module.device)
        self._stats.measure_every = self.every_n_steps
        self._gradients = []
        self._buffers = list(pl_module.buffers())
        self._before, self._first = _copies(self._buffers), _copies(self._buffers)
        if self._saved is not None:
            self._restore(self._saved, pl_module.device)
            self._saved = None

    def _restore(self, saved: dict[str, Any], device: torch.device) -> None:
        """Goes on from what `state_dict` returned."""
        if self.exchange is not None:
            self.exchange.load_state_dict(saved)
        if "step" in saved:
            step = saved["step"]
            self._gradients = [
                [None if one is None else one.to(device) for one in own] for own in step["gradients"]
            ]
            _copy(self._before, step["before"])
            _copy(self._first, step["first"])

    def on_train_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        """Gives every rank the buffers that the step began with."""
        self._ends_step = (batch_idx + 1) % self.ranks == 0 or trainer.is_last_batch
        if self._gradients:
            _copy(self._buffers, self._before)
        else:
            _copy(self._before, self._buffers)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes a rank's gradients; after the last rank's, puts the mean in their place.

        The first rank's buffers are those that training goes on with.
        """
        # Lightning divides the loss by the number of batches that make a step.
        self._gradients.append(
            [None if p.grad is None else p.grad.detach() * self.ranks for p in self._parameters]
        )
        for parameter in self._parameters:
            parameter.grad = None
        if len(self._gradients) == 1:
            _copy(self._first, self._buffers)
        if self._ends_step:
            self._average(pl_module)
            _copy(self._buffers, self._first)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        """Logs the step's bytes and error."""
        last = self._stats.last if self._stats is not None and self._ends_step else None
        if last is not None and last.step % self.every_n_steps == 0:
            found = figures(last)
            log_sink.log_metrics(trainer, {name: found[name] for name in _LOGGED if name in found})

    def _average(self, pl_module: LightningModule) -> None:
        """Exchanges the gradients of a step."""
        if self.exchange is None:
            return
        if any(parameter.grad is not None for parameter in pl_module.parameters()):
            raise ValueError(
                "parameters: got some that require gradients only since training began, allowed with "
                "SimulatedRanks, as with DDP, are those that did from the start"
            )
        gradients, self._gradients = self._gradients, []
        ranks = [
            [
                torch.zeros_like(parameter) if gradient is None else gradient
                for parameter, gradient in zip(
                    self._parameters, gradients[rank % len(gradients)], strict=True
                )
            ]
            for rank in range(self.ranks)
        ]
        used = [any(one is not None for one in own) for own in zip(*gradients, strict=True)]
        for parameter, mean, some in zip(self._parameters, self.exchange.average(ranks), used, strict=True):
            parameter.grad = mean.to(parameter.dtype) if some else None


_LOGGED = ("comm/sent_bytes", "comm/ratio", "comm/relative_error")


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors]


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    if targets:
        copy_each(targets, sources)


def _callbacks(trainer: Trainer) -> Sequence[Callback]:
    found: Sequence[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return found


def _exchange_arguments(strategy: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of `SimulatedExchange`; raises `ValueError` where a setting is not allowed."""
    unknown = sorted(settings.keys() - ExchangeConfig.__dataclass_fields__.keys())
    if unknown:
        fields = ", ".join(ExchangeConfig.__dataclass_fields__)
        raise ValueError(f"settings: got {unknown[0]!r}, allowed are {fields}")
    if strategy == "ddp":
        check(not settings, "settings", dict(settings), "are none with strategy='ddp', whose mean is exact")
        return {"codec": IdentityCodec()}
    return {"config": ExchangeConfig(**{**CODECS[strategy], **settings})}
