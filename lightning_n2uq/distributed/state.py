"""The explicit state of the exchange: settings, step counter and residuals of one rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import GradBucket  # type: ignore[attr-defined]  # public, not in the stubs

from lightning_n2uq.compression import Codec, codec_at_step
from lightning_n2uq.distributed.config import ExchangeConfig
from lightning_n2uq.distributed.exchange import Engine
from lightning_n2uq.distributed.farewell import report_failure
from lightning_n2uq.distributed.plan import BucketPlan, lay_out
from lightning_n2uq.distributed.refuse import refuse_sharded
from lightning_n2uq.distributed.residuals import Layout, Owed, as_layout
from lightning_n2uq.distributed.resume_layout import Regrouping
from lightning_n2uq.distributed.stats import ExchangeStats


class NUQSGDState:
    """State of :func:`~lightning_n2uq.distributed.hook.nuqsgd_hook`.

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
        **settings: Fields of :class:`~lightning_n2uq.distributed.config.ExchangeConfig`, such as
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
        "_regrouping",
        "config",
        "owed",
        "process_group",
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
        self.owed = Owed()  # what no plan holds yet
        self._regrouping: Regrouping | None = None
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
        parameters, index = list(bucket.parameters()), bucket.index()
        if self._regrouping is None:
            return self._submit(step, index, parameters, buffer, last)
        names = [self._name(parameter) for parameter in parameters]
        held = self._regrouping.hold(buffer, names, parameters, bucket.gradients())
        if last:
            regrouping, self._regrouping = self._regrouping, None
            layout = self._layout_to_resume(regrouping.own_layout())
            regrouping.release(layout, lambda *bucket: self._submit(step, *bucket))
        return held

    def _submit(
        self, step: int, index: int, parameters: list[Tensor], buffer: Tensor, last: bool
    ) -> torch.futures.Future[Tensor]:
        engine = self._engine
        if engine is None:
            raise RuntimeError("the exchange is closed")
        return engine.submit(self._plan(engine, step, index, parameters, buffer.dtype), buffer, step, last)

    def _layout_to_resume(self, own: Layout) -> Layout:
        """Return the layout for the first step after a resume: the checkpoint's, unless things changed."""
        same = sorted(name for names in own for name in names)
        if self.owed.geometry == self._geometry() and same == sorted(
            name for names in self.owed.layout for name in names
        ):
            return self.owed.layout
        self.owed.move_to_gradient()
        return own

    def _geometry(self) -> dict[str, Any]:
        return {**self.config.geometry(), "world_size": self.world_size}

    def _plan(
        self, engine: Engine, step: int, index: int, parameters: list[Tensor], dtype: torch.dtype
    ) -> BucketPlan:
        """Return the bucket's plan, a new one where DDP rebuilt the buckets or warm-up ended."""
        warm = step < self.config.warmup_steps
        key = (warm, dtype, *(id(parameter) for parameter in parameters))
        plan = engine.plans.get(index)
        if plan is not None and plan.key == key:
            return plan
        if plan is not None:
            self._retire(engine)
        codecs = tuple(codec_at_step(codec, step, self.config.warmup_steps) for codec in self._codecs)
        places = lay_out(parameters, self._name, self._travels_exactly)
        plan = engine.prepare(index, key, places, (codecs[0], codecs[1]), dtype)
        plan.import_residuals(self.owed)
        return plan

    def _retire(self, engine: Engine) -> None:
        """Drop all plans; residuals go back to their parameters, because no old bucket survives a rebuild."""
        self.owed = self._all_owed(engine)
        self.owed.move_to_gradient()
        engine.plans.clear()

    def _all_owed(self, engine: Engine | None) -> Owed:
        """Return what is owed here and in the plans."""
        owed = replace(
            self.owed, gradient=dict(self.owed.gradient), legs=[dict(leg) for leg in self.owed.legs]
        )
        if engine is not None and engine.plans:
            plans = [engine.plans[index] for index in sorted(engine.plans)]
            owed.layout, owed.geometry = tuple(plan.names for plan in plans), self._geometry()
            if self.config.error_feedback:
                for plan in plans:
                    plan.export_residuals(owed)
        return owed

    def rebuilt(self, buckets: Sequence[GradBucket]) -> None:
        """Learn that DDP rebuilt its buckets before the next step, of which the hook will see them.

        Args:
            buckets: As they are now.
        """
        if self._engine is not None:
            self._retire(self._engine)
            names = [[self._name(parameter) for parameter in bucket.parameters()] for bucket in buckets]
            self.owed.layout, self.owed.geometry = as_layout(names), self._geometry()

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
        """Return the state: ``step``, ``seed`` and, in ``owed``, residuals and layout of the buckets."""
        return {"step": self.step, "seed": self.config.seed, "owed": self._all_owed(self._engine).export()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict` of this rank; call it before training goes on.

        Random numbers are a function of seed, rank, step and place in the layout of the buckets, so the
        step and the layout are all that is needed to continue them; the seed is that of the settings.
        The next step uses the saved layout, later ones DDP's, which comes out the same. Where settings or
        parameters changed, DDP's layout is used from the start.
        """
        if self._engine is not None:
            self._engine.plans.clear()  # with the residuals that are replaced here
        self.step = int(state["step"])
        self.owed = Owed.restore(state["owed"])
        self._regrouping = Regrouping() if self.owed.layout else None

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
