"""The strategy for few exchanges: `--trainer.strategy nuqsgd_local`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer
from typing_extensions import override

from lightning_n2uq.compression import CODECS
from lightning_n2uq.distributed.agreed_weights import LocalConfig
from lightning_n2uq.distributed.config import ExchangeConfig, take_fields
from lightning_n2uq.distributed.local_rounds import LocalRounds, refuse_sync_batch_norm
from lightning_n2uq.distributed.residuals import state_for_rank
from lightning_n2uq.strategies import rank_states
from lightning_n2uq.strategies.base import HookedDDPStrategy, keywords_of
from lightning_n2uq.strategies.nuqsgd import NUQSGDStrategy
from lightning_n2uq.strategies.whole_weights import refuse_own_freezing
from lightning_n2uq.utils import compat_lightning
from lightning_n2uq.utils.validation import check

_OF_DDP = ("find_unused_parameters", "static_graph", "gradient_as_bucket_view", "bucket_cap_mb")

LOCAL: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "nuqsgd_local": {},
        "nuqsgd_local_2bit": CODECS["nuqsgd_rotated_2bit"],
        "nuqsgd_local_1bit": CODECS["nuqsgd_rotated_1bit"],
    }
)
"""The arguments of `LocalNUQSGDStrategy` by registered name."""


class LocalNUQSGDStrategy(NUQSGDStrategy):
    """Ranks that train alone for `period` steps, and then exchange the quantized change of their weights.

    Registered as `nuqsgd_local` (4 bits) and, rotated, `nuqsgd_local_2bit` and `nuqsgd_local_1bit`.
    `lightning_n2uq.distributed.local_rounds` tells a round step by step. A round also ends before every
    validation and with the last step of training, so that validation, testing and final checkpoints see
    weights which all ranks agreed on. Checkpoints in the middle of a round hold those of the last one as the
    model's weights, and every rank's own beside them. There is no wrapper of DDP, so parameters without
    gradient need no argument.

    Args:
        **arguments: The fields of `LocalConfig` and `ExchangeConfig`, whose steps are rounds here, and
            `process_group_backend`, `timeout`, `start_method` of `HookedDDPStrategy`.

    Attributes:
        rounds: The rounds, from the start of a fit on.

    Raises:
        ValueError: If an argument is not allowed; the message names it.
    """

    @keywords_of(LocalConfig, ExchangeConfig, HookedDDPStrategy, without=_OF_DDP)
    def __init__(self, **arguments: Any) -> None:  # noqa: ANN401  # typed by those three
        for name in _OF_DDP:
            if name in arguments:
                allowed = "with strategies that wrap the model in DDP only, which nuqsgd_local does not"
                check(False, name, arguments[name], allowed)
        self.local = LocalConfig(**take_fields(LocalConfig, arguments))
        super().__init__(**arguments)
        self.rounds: LocalRounds | None = None
        self._stepped = False

    @property
    def steps_per_exchange(self) -> int:
        """The optimizer steps between two exchanges."""
        return self.local.period

    @override
    def setup(self, trainer: Trainer) -> None:
        """Refuses what needs ranks that are equal in every step, and sees to it that rounds end in time."""
        if trainer.state.fn == TrainerFn.FITTING:
            waits = compat_lightning.synchronizes_batch_norm(self)
            check(not waits, "sync_batchnorm", True, "is False: ranks of nuqsgd_local train alone")
            if self.lightning_module is not None:
                refuse_sync_batch_norm(self.lightning_module)
            refuse_own_freezing(trainer.callbacks)  # type: ignore[attr-defined]
        super().setup(trainer)
        if trainer.state.fn == TrainerFn.FITTING:
            trainer.callbacks.insert(0, RoundEnds(self))  # type: ignore[attr-defined]

    @override
    def configure_ddp(self) -> None:
        """Starts the rounds in DDP's place; called again where parameters were replaced."""
        if self.rounds is not None:
            self.rounds.follow()
            return
        module = self.lightning_module
        if module is None:
            raise TypeError("the strategy has no model yet")
        self.rounds = LocalRounds(module, timeout=self.timeout, local=self.local, config=self.own_config())
        self.state = self.rounds.state
        restored, self._restored = self._restored, None
        exchange = None if restored is None else restored.get("exchange")
        if exchange is not None:
            self.state.load_state_dict(state_for_rank(exchange, self.global_rank, self.world_size))
        self.rounds.start(self.root_device)
        if restored is not None:
            self.rounds.load_state_dict(restored["rounds"], restored["own"])

    @override
    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: LightningModule | Module | None = None,
        **kwargs: Any,
    ) -> Any:
        """Takes this rank's own step."""
        if self.rounds is not None:
            self.rounds.follow()
        self._stepped = True
        return super().optimizer_step(optimizer, closure, model, **kwargs)

    def after_batch(self, trainer: Trainer) -> None:
        """Counts a batch in which an optimizer stepped, and ends the round where it is time to."""
        if self.rounds is None:
            return
        ended = self.rounds.step() if self._stepped else False
        self._stepped = False
        if not ended and (compat_lightning.validation_follows(trainer) or _was_last(trainer)):
            self.rounds.close()

    def close_round(self) -> None:
        """Ends the present round, unless it has no step yet. A collective call."""
        if self.rounds is not None:
            self.rounds.close()

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Returns the weights that all ranks agreed on, also in the middle of a round."""
        if self.rounds is None or not self.rounds.steps:
            return super().lightning_module_state_dict()
        with self.rounds.agreed_values():
            state = super().lightning_module_state_dict()
            return {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Adds the rounds' state and every rank's own, unless only weights are saved."""
        if self.rounds is not None and "optimizer_states" in checkpoint:
            own = self.rounds.own_state() | rank_states.own_parts(checkpoint, self.precision_plugin)
            ranks = rank_states.gather(own) if self.local.save_ranks else []
            checkpoint[rank_states.KEY] = {"rounds": self.rounds.state_dict(), "ranks": ranks}
        super().save_checkpoint(checkpoint, filepath, storage_options)

    @override
    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Puts this rank's own parts where Lightning looks for them, and keeps the rest until the start."""
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only=weights_only)
        module = self.lightning_module
        if module is None or module.trainer.state.fn != TrainerFn.FITTING:
            return checkpoint
        exchange, self._restored = self._restored, None
        saved = checkpoint.get(rank_states.KEY)
        if saved is not None:
            own = rank_states.for_rank(saved["ranks"], self.global_rank, self.world_size)
            rank_states.put_back(checkpoint, own, self.precision_plugin)
            self._restored = {"exchange": exchange, "rounds": saved["rounds"], "own": own}
        elif exchange is not None:
            rank_states.warn_of_other_strategy()
        return checkpoint

    def _step(self) -> int:
        module = self.lightning_module
        return 0 if module is None else module.trainer.global_step

    @override
    def teardown(self) -> None:
        """Ends the exchange's threads, and leaves the trainer as it was."""
        module = self.lightning_module
        trainer = None if module is None else compat_lightning.attached_trainer(module)
        if trainer is not None:
            trainer.callbacks[:] = [c for c in trainer.callbacks if not isinstance(c, RoundEnds)]
        super().teardown()
        self.rounds = None


class RoundEnds(Callback):
    """Ends rounds before any other callback looks at the weights; the strategy puts it in front.

    Args:
        strategy: The strategy.
    """

    def __init__(self, strategy: LocalNUQSGDStrategy) -> None:
        self._strategy = strategy

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:  # noqa: ANN401
        """Counts the batch."""
        self._strategy.after_batch(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends a round that goes on where nobody saw the validation come."""
        if not trainer.sanity_checking:
            self._strategy.close_round()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends the last round of a training that ended early."""
        self._strategy.close_round()


def _was_last(trainer: Trainer) -> bool:
    """Returns whether training ends with the batch that it has just been through."""
    limit, epochs = trainer.max_steps, trainer.max_epochs
    if limit not in (None, -1) and trainer.global_step >= limit:
        return True
    last_epoch = epochs not in (None, -1) and trainer.current_epoch + 1 >= (epochs or 0)
    return bool(trainer.is_last_batch and last_epoch)
