"""The strategy: `--trainer.strategy nuqsgd`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch.trainer.states import TrainerFn
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from lightning_n2uq.distributed.config import ExchangeConfig, take_fields
from lightning_n2uq.distributed.hook import NUQSGDState, nuqsgd_hook
from lightning_n2uq.distributed.residuals import KEY, gather_state, state_for_rank
from lightning_n2uq.strategies.base import HookedDDPStrategy, keywords_of
from lightning_n2uq.strategies.ranks import RanksThatTell
from lightning_n2uq.utils import compat


class NUQSGDStrategy(RanksThatTell, HookedDDPStrategy):
    """DDP whose ranks exchange quantized gradients (NUQSGD; QSGD by other arguments).

    Ramezani-Kebrya et al., JMLR 22(114), 2021, arXiv 1908.06077. Registered as `nuqsgd` and, with other
    defaults, `nuqsgd_2bit` (rotated buckets), `nuqsgd_3bit` (`linf`, buckets of 256: few levels need them),
    `nuqsgd_8bit`, `nuqsgd_rotated` and its variants, `qsgd`, `qsgd_inf` and the other methods. Step counter
    and residuals are saved in and restored from checkpoints; on another number of ranks, every rank starts
    with the mean of the saved residuals, so that nothing is lost. Validation, testing and prediction are not
    affected.

    Args:
        **arguments: The fields of `ExchangeConfig` and the arguments of `HookedDDPStrategy`.

    Raises:
        ValueError: If an argument is not allowed; the message names it.
    """

    @keywords_of(ExchangeConfig, HookedDDPStrategy)
    def __init__(self, **arguments: Any) -> None:  # noqa: ANN401  # typed by those two
        settings = take_fields(ExchangeConfig, arguments)
        super().__init__(**arguments)
        self.config = ExchangeConfig(**settings)
        self.state: NUQSGDState | None = None
        self._restored: dict[str, Any] | None = None

    @property
    def steps_per_exchange(self) -> int:
        """The optimizer steps between two exchanges."""
        return 1

    def own_config(self) -> ExchangeConfig:
        """Returns the settings, with this node's processes as `ranks_per_node` where that is open."""
        if not self.config.hierarchical or self.config.ranks_per_node is not None:
            return self.config
        return replace(self.config, ranks_per_node=self.num_processes)

    @override
    def make_hook(self, model: DistributedDataParallel) -> tuple[object, Callable[..., Any]]:
        """Returns the exchange's hook and its connected state; ranks that disagree stop here."""
        self.state = NUQSGDState(module=model.module, timeout=self.timeout, config=self.own_config())
        if self._restored is not None:
            self.state.load_state_dict(state_for_rank(self._restored, self.global_rank, self.world_size))
            self._restored = None
        self.state.connect(self.root_device)
        return self.state, nuqsgd_hook

    @override
    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        filepath: str | Path,
        storage_options: Any | None = None,
    ) -> None:
        """Adds every rank's step counter and residuals, unless only weights are saved."""
        if self.state is not None and "optimizer_states" in checkpoint:
            self._rebuild_buckets(self.state)
            checkpoint[KEY] = gather_state(self.state.state_dict(), self.root_device)
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def _rebuild_buckets(self, state: NUQSGDState) -> None:
        """Does what DDP would do before the next step, so that a resumed run begins with the same buckets."""
        if isinstance(self.model, DistributedDataParallel):
            buckets = compat.rebuild_buckets(self.model)
            if buckets is not None:
                state.rebuilt(buckets)

    @override
    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Keeps the saved state until the model is wrapped; a checkpoint of another strategy has none."""
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only=weights_only)
        module = self.lightning_module
        if module is not None and module.trainer.state.fn == TrainerFn.FITTING:
            self._restored = checkpoint.get(KEY)
        return checkpoint
