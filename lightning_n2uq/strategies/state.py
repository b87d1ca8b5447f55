"""The explicit state of the exchange: settings, step counter and residuals of one rank."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket

from lightning_n2uq.compression import Codec, codec_at_step
from lightning_n2uq.strategies.config import ExchangeConfig
from lightning_n2uq.strategies.engine import Engine
from lightning_n2uq.strategies.farewell import report_failure
from lightning_n2uq.strategies.plan import BucketPlan, lay_out
from lightning_n2uq.strategies.refuse import refuse_sharded
from lightning_n2uq.strategies.stats import ExchangeStats


class NUQSGDState:
    """State of :func:`~lightning_n2uq.strategies.hook.nuqsgd_hook`.

    Picklable: process groups, threads and buffers are left out and made again at the next call.

    Args:
        process_group: Ranks that synchronise; the default group if None. With subgroups, every rank of
            the default group has to be in one: torch names new groups by counting calls.
        module: Gives parameters their names, by which residuals are kept; without it they are
            numbered in the order in which DDP first hands them over.
        codec: Replaces the codec made from the settings, in both phases (for example
            ``IdentityCodec()``, with which the exchange reproduces plain DDP).
        timeout: Of the exchange's process groups.
        config: Settings; made from the keywords if None.
        **settings: Fields of :class:`~lightning_n2uq.strategies.config.ExchangeConfig`, such as
            ``bits``, ``bucket_size``, ``norm``, ``levels``, ``scheme``, ``error_feedback``.

    Attributes:
        step: Synchronised steps so far.

    Raises:
        ValueError: If a setting is not allowed or ``module`` is sharded.
        TypeError: If a setting is unknown.

    Example:
        >>> state = NUQSGDState(bits=4, bucket_size=1024)
        >>> state.step
        0
    """

    __slots__ = (
        "__weakref__",
        "_codecs",
        "_engine",
        "_names",
        "config",
        "process_group",
        "residuals",
        "step",
        "timeout",
    )

    def __init__(
        self,
        process_group: dist.ProcessGroup | None = None,
        *,
        module: nn.Module | None = None,
        codec: Codec | None = None,
        timeout: timedelta | None = None,
        config: ExchangeConfig | None = None,
        **settings: Any,  # noqa: ANN401  # typed by ExchangeConfig, which refuses unknown names
    ) -> None:
        self.config = replace(config, **settings) if config is not None else ExchangeConfig(**settings)
        self.process_group, self.timeout = process_group, timeout
        self.step = 0
        self.residuals: dict[str, Tensor] = {}
        self._codecs = (self.config.codec(), self.config.second_codec()) if codec is None else (codec, codec)
        self._engine: Engine | None = None
        self._names: dict[int, str] = {}
        if module is not None:
            self.bind(module)
        elif self.config.skip_patterns:
            raise ValueError(
                f"`skip_patterns` needs `module` for names, got {self.config.skip_patterns!r} and None"
            )

    def bind(self, module: nn.Module) -> None:
        """Learn the parameters' names.

        Raises:
            ValueError: If the module is sharded or a pattern matches nothing.
        """
        refuse_sharded(module)
        self._names = {id(parameter): _plain(name) for name, parameter in module.named_parameters()}
        for pattern in self.config.skip_patterns:
            if not any(fnmatchcase(name, pattern) for name in self._names.values()):
                raise ValueError(f"`skip_patterns` must match parameters of the module, got {pattern!r}")

    @property
    def world_size(self) -> int:
        """Return the number of ranks that synchronise."""
        return dist.get_world_size(self.process_group)

    @property
    def stats(self) -> ExchangeStats | None:
        """Return the counters; None before the first exchange and with one rank."""
        return None if self._engine is None else self._engine.stats

    def connect(self, device: torch.device) -> None:
        """Join the other ranks: handshake, process groups, threads.

        A collective call; the first hook call makes it if nobody did before.

        Raises:
            ValueError: On every rank, if two ranks disagree on a setting.
        """
        if self._engine is None and self.world_size > 1:
            self._engine = Engine(
                self.config, self._codecs, self.process_group, device, self.timeout, {"step": self.step}
            )

    def synchronise(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """Start averaging a bucket over the ranks; what the hook does once it has checked the bucket."""
        buffer, last, step = bucket.buffer(), bucket.is_last(), self.step
        self.step += last
        if self.world_size == 1:
            future: torch.futures.Future[Tensor] = torch.futures.Future()
            future.set_result(buffer)
            return future
        self.connect(buffer.device)
        if self._engine is None:
            raise RuntimeError("the exchange is closed")
        return self._engine.submit(self._plan(self._engine, bucket, step), buffer, step, last)

    def _plan(self, engine: Engine, bucket: GradBucket, step: int) -> BucketPlan:
        """Return the bucket's plan, a new one where DDP rebuilt the buckets or warm-up ended."""
        parameters, index, buffer = bucket.parameters(), bucket.index(), bucket.buffer()
        warm = step < self.config.warmup_steps
        key = (warm, buffer.dtype, *(id(parameter) for parameter in parameters))
        plan = engine.plans.get(index)
        if plan is not None and plan.key == key:
            return plan
        if plan is not None:
            self._retire(engine)
        codecs = tuple(codec_at_step(codec, step, self.config.warmup_steps) for codec in self._codecs)
        places = lay_out(parameters, self._name, self._travels_exactly)
        plan = engine.prepare(index, key, places, (codecs[0], codecs[1]), buffer.dtype)
        plan.import_residuals(self.residuals)
        return plan

    def _retire(self, engine: Engine) -> None:
        """Drop all plans; residuals go back to their parameters, because no old bucket survives a rebuild."""
        self.residuals = self._owed(engine)
        engine.plans.clear()

    def _owed(self, engine: Engine | None) -> dict[str, Tensor]:
        owed = dict(self.residuals)
        if engine is not None and self.config.error_feedback:
            for plan in engine.plans.values():
                plan.export_residuals(owed)
        return owed

    def _name(self, parameter: Tensor) -> str:
        return self._names.setdefault(id(parameter), f"parameter{len(self._names)}")

    def _travels_exactly(self, parameter: Tensor) -> bool:
        name = self._name(parameter)
        small = parameter.dim() <= 1 or parameter.numel() < self.config.min_numel
        return small or any(fnmatchcase(name, pattern) for pattern in self.config.skip_patterns)

    @property
    def doing(self) -> str:
        """Return what this rank tells the others that it is doing; set it to tell them more."""
        return "start" if self._engine is None else self._engine.doing

    @doing.setter
    def doing(self, text: str) -> None:
        if self._engine is not None:
            self._engine.doing = text

    def report(self, error: BaseException) -> str:
        """Tell the other ranks that this one ends by ``error``; ask them first whether they are the cause.

        Call it where a training loop ends by an error. Takes a few seconds at most.

        Returns:
            What is known of the cause on other ranks, an empty string if nothing.
        """
        return "" if self._engine is None else report_failure(self._engine, error)

    def close(self) -> None:
        """Keep the residuals and end the threads; a later exchange connects again."""
        if self._engine is not None:
            self._retire(self._engine)
            self._engine.close()
            self._engine = None

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's state: ``step``, ``seed`` and ``residuals`` by parameter (fp32, flat, CPU)."""
        owed = self._owed(self._engine)
        residuals = {name: residual.to("cpu", copy=True) for name, residual in owed.items()}
        return {"step": self.step, "seed": self.config.seed, "residuals": residuals}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict` of this rank; call it before training goes on.

        Random numbers are a function of seed, rank, step and message, so the step is all that is
        needed to continue them; the seed is that of the settings.
        """
        if self._engine is not None:
            self._engine.plans.clear()  # with the residuals that are replaced here
        self.step = int(state["step"])
        self.residuals = {name: residual.clone() for name, residual in state["residuals"].items()}

    def __getstate__(self) -> dict[str, Any]:
        """Return everything but process groups, threads and the identities of parameters."""
        return {
            "config": self.config,
            "timeout": self.timeout,
            "codecs": self._codecs,
            "state": self.state_dict(),
        }

    def __setstate__(self, saved: dict[str, Any]) -> None:
        """Restore; the default process group is used, and :meth:`bind` gives parameters their names again."""
        self.config, self.timeout, self._codecs = saved["config"], saved["timeout"], saved["codecs"]
        self.process_group, self._engine, self._names = None, None, {}
        self.load_state_dict(saved["state"])


def _plain(name: str) -> str:
    """Return a parameter's name without the prefixes of wrappers, which checkpoints must not depend on."""
    return name.removeprefix("module.").replace("_orig_mod.", "")
