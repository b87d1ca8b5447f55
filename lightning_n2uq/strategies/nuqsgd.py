"""The strategy: ``--trainer.strategy nuqsgd``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torch.distributed.constants import default_pg_timeout
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from lightning_n2uq.distributed.checkpoint import KEY, gather_state, state_for_rank
from lightning_n2uq.distributed.config import ExchangeConfig
from lightning_n2uq.distributed.hook import nuqsgd_hook
from lightning_n2uq.distributed.state import NUQSGDState
from lightning_n2uq.strategies.base import HookedDDPStrategy
from lightning_n2uq.utils.compat import rebuild_buckets


class NUQSGDStrategy(HookedDDPStrategy):
    """DDP whose ranks exchange quantized gradients (NUQSGD; QSGD by other arguments).

    Ramezani-Kebrya et al., JMLR 22(114), 2021, arXiv 1908.06077. Registered as ``nuqsgd`` and, with
    other defaults, ``nuqsgd_2bit`` and ``nuqsgd_3bit`` (``linf``, buckets of 256: few levels need
    them), ``nuqsgd_8bit``, ``qsgd`` and ``qsgd_inf``. Step
    counter and residuals are saved in and restored from checkpoints; on another number of ranks,
    every rank starts with the mean of the saved residuals, which keeps what is still owed.
    Validation, testing and prediction are not affected.

    Args:
        bits: Bits per coordinate, sign included: 2, 3, 4 or 8.
        bucket_size: Coordinates that share a norm.
        norm: ``"l2"`` or ``"linf"``.
        levels: ``"exponential"``, ``"uniform"``, ``"float"`` or the list of levels.
        mantissa_bits: For ``levels="float"``.
        coding: ``"packed"``, or ``"huffman"`` for slow links.
        scheme: ``"two_phase"`` or ``"all_gather"`` (the paper's; bytes grow with the ranks).
        second_phase_bits: Bits of the averaged gradient; ``bits`` if None.
        hierarchical: Full precision inside a node, compressed between nodes.
        ranks_per_node: Ranks of a node; this node's processes if None.
        error_feedback: Add what compression lost to the next gradient.
        warmup_steps: First steps in full precision.
        skip_patterns: Globs of parameter names that travel in full precision.
        min_numel: Smaller parameters travel in full precision, as do all 1-D ones.
        unit_numel: Coordinates per piece of the pipeline.
        seed: Base seed of the stochastic rounding.
        find_unused_parameters: As in ``DistributedDataParallel``.
        static_graph: As in ``DistributedDataParallel``.
        gradient_as_bucket_view: As in ``DistributedDataParallel``.
        bucket_cap_mb: Size of DDP's buckets in MiB.
        process_group_backend: Chosen by device if None.
        timeout: Of process groups.
        start_method: How Lightning starts the processes of a node.

    Raises:
        ValueError: If an argument is not allowed; the message names it.
    """

    def __init__(
        self,
        bits: int = 4,
        bucket_size: int = 1024,
        norm: Literal["l2", "linf"] = "l2",
        levels: str | list[float] = "exponential",
        mantissa_bits: int | None = None,
        coding: Literal["packed", "huffman"] = "packed",
        scheme: Literal["two_phase", "all_gather"] = "two_phase",
        second_phase_bits: int | None = None,
        hierarchical: bool = False,
        ranks_per_node: int | None = None,
        error_feedback: bool = False,
        warmup_steps: int = 0,
        skip_patterns: Sequence[str] = (),
        min_numel: int = 256,
        unit_numel: int = 1 << 20,
        seed: int = 0,
        find_unused_parameters: bool = False,
        static_graph: bool = False,
        gradient_as_bucket_view: bool = False,
        bucket_cap_mb: float | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
    ) -> None:
        super().__init__(
            find_unused_parameters=find_unused_parameters,
            static_graph=static_graph,
            gradient_as_bucket_view=gradient_as_bucket_view,
            bucket_cap_mb=bucket_cap_mb,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
        )
        self.config = ExchangeConfig(
            bits=bits,
            bucket_size=bucket_size,
            norm=norm,
            levels=levels,
            mantissa_bits=mantissa_bits,
            coding=coding,
            scheme=scheme,
            second_phase_bits=second_phase_bits,
            hierarchical=hierarchical,
            ranks_per_node=ranks_per_node,
            error_feedback=error_feedback,
            warmup_steps=warmup_steps,
            skip_patterns=tuple(skip_patterns),
            min_numel=min_numel,
            unit_numel=unit_numel,
            seed=seed,
        )
        self.state: NUQSGDState | None = None
        self._restored: dict[str, Any] | None = None

    @override
    def make_hook(self, model: DistributedDataParallel) -> tuple[object, Callable[..., Any]]:
        """Return the exchange's hook and its connected state; ranks that disagree stop here."""
        config = self.config
        if config.hierarchical and config.ranks_per_node is None:
            config = replace(config, ranks_per_node=self.num_processes)
        self.state = NUQSGDState(module=model.module, timeout=self.timeout, config=config)
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
        """Add every rank's step counter and residuals, unless only weights are saved."""
        if self.state is not None and "optimizer_states" in checkpoint:
            self._rebuild_buckets(self.state)
            checkpoint[KEY] = gather_state(self.state, self.root_device)
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def _rebuild_buckets(self, state: NUQSGDState) -> None:
        """Do what DDP would do before the next step, so that a resumed run begins with the same buckets."""
        if isinstance(self.model, DistributedDataParallel):
            buckets = rebuild_buckets(self.model)
            if buckets is not None:
                state.rebuilt(buckets)

    @override
    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Keep the saved state until the model is wrapped; a checkpoint of another strategy has none."""
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only=weights_only)
        module = self.lightning_module
        if module is not None and module.trainer.state.fn == TrainerFn.FITTING:
            self._restored = checkpoint.get(KEY)
        return checkpoint

    @override
    def on_exception(self, exception: BaseException) -> None:
        """Tell the other ranks, and name those that caused it where another collective failed."""
        super().on_exception(exception)
        cause = "" if self.state is None else self.state.report(exception)
        if cause:
            exception.args = (f"{exception} [{cause}]", *exception.args[1:])

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Run the forward pass, which other ranks hear of when they ask."""
        self._now(f"forward pass of step {self._step()}")
        return super().training_step(*args, **kwargs)

    @override
    def pre_backward(self, closure_loss: Tensor) -> None:
        """Prepare the backward pass, which other ranks hear of when they ask."""
        self._now(f"backward pass of step {self._step()}")
        super().pre_backward(closure_loss)

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Run a validation step, which other ranks hear of when they ask."""
        self._now(f"validation before step {self._step()}")
        return super().validation_step(*args, **kwargs)

    def _step(self) -> int:
        return 0 if self.state is None else self.state.step

    def _now(self, doing: str) -> None:
        if self.state is not None:
            self.state.doing = doing

    @override
    def teardown(self) -> None:
        """End the exchange's threads."""
        if self.state is not None:
            self.state.close()
        super().teardown()
