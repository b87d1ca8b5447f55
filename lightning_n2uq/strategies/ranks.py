"""What our strategies share, whatever they wrap the model in: ranks meet, agree, and hear of each other."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from typing_extensions import override

from lightning_n2uq.distributed import NUQSGDState
from lightning_n2uq.distributed.collectives import require_equal
from lightning_n2uq.distributed.sharded import ShardedState
from lightning_n2uq.strategies import agreement
from lightning_n2uq.strategies.meeting import meeting_store
from lightning_n2uq.utils import compat_lightning


class RanksThatAgree(ParallelStrategy):
    """Ranks that join over loopback on one machine, and compare what they were started with before a fit.

    Attributes:
        timeout: How long the process groups wait for a peer before they fail.
    """

    timeout: timedelta | None
    _compared = False

    def meet(self) -> None:
        """Joins the process group: on one machine over loopback only, also after a restart by torchrun."""
        environment = self.cluster_environment
        if environment is None:
            return
        self.set_world_ranks()  # type: ignore[attr-defined]  # of all strategies with several processes
        store = meeting_store(environment, self.timeout)
        if store is not None:
            rank, size = environment.global_rank(), environment.world_size()
            agreement.require_presence(store, rank, size, self.timeout)
            backend = compat_lightning.process_group_backend(self)
            compat_lightning.init_process_group(environment, backend, store, self.timeout)

    def compare_settings(self, trainer: Trainer) -> None:
        """Compares the ranks' settings before a fit, while nothing was exchanged yet."""
        self._compared = trainer.state.fn != TrainerFn.FITTING or self.world_size == 1
        if not self._compared and self.lightning_module is not None:
            name = type(self).__name__
            agreement.require_same(agreement.settings(trainer, self.lightning_module, name), self.timeout)

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Compares what the ranks train with before the first step."""
        if not self._compared and self.lightning_module is not None:
            self._compared = True
            require_equal(agreement.training(self.lightning_module.trainer), self.root_device)
        return super().training_step(*args, **kwargs)


class RanksThatTell(ParallelStrategy):
    """Ranks that answer each other's questions about a failure.

    Attributes:
        state: The exchange; None before training.
    """

    state: NUQSGDState | ShardedState | None

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Runs the forward pass, which other ranks hear of when they ask."""
        self._now(f"forward pass of step {self._step()}")
        return super().training_step(*args, **kwargs)

    @override
    def pre_backward(self, closure_loss: Tensor) -> None:
        """Prepares the backward pass, which other ranks hear of when they ask."""
        self._now(f"backward pass of step {self._step()}")
        super().pre_backward(closure_loss)

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Runs a validation step, which other ranks hear of when they ask."""
        self._now(f"validation before step {self._step()}")
        return super().validation_step(*args, **kwargs)

    @override
    def on_exception(self, exception: BaseException) -> None:
        """Tells the other ranks, and names those that caused it where another collective failed."""
        super().on_exception(exception)
        cause = "" if self.state is None else self.state.report(exception)
        if cause:
            exception.args = (f"{exception} [{cause}]", *exception.args[1:])

    @override
    def teardown(self) -> None:
        """Ends the threads that exchange and that answer other ranks."""
        if self.state is not None:
            self.state.close()
        super().teardown()

    def _step(self) -> int:
        return 0 if self.state is None else self.state.step

    def _now(self, status: str) -> None:
        if self.state is not None:
            self.state.status = status
