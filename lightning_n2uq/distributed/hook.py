"""The hook for `DistributedDataParallel` and its state.

Use: `ddp.register_comm_hook(NUQSGDState(...), nuqsgd_hook)`. What happens to a bucket is told in
`lightning_n2uq.distributed.exchange`.
"""

# No `from __future__ import annotations` here: DDP compares the annotation objects of hooks.

from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from lightning_n2uq.compression import Codec, codec_at_step
from lightning_n2uq.distributed.adaptation import LevelAdaptation
from lightning_n2uq.distributed.config import ExchangeConfig
from lightning_n2uq.distributed.exchange import BucketPlan, Exchange, connect
from lightning_n2uq.distributed.partition import place_parameters
from lightning_n2uq.distributed.residuals import Layout, Residuals, as_layout
from lightning_n2uq.distributed.resume_layout import ResumeLayout
from lightning_n2uq.distributed.stats import ExchangeStats
from lightning_n2uq.utils.compat import GradBucket
from lightning_n2uq.utils.shards import is_sharded

_ADVICE = "use the strategy nuqsgd_fsdp (in plain PyTorch ShardedState), or DistributedDataParallel"


class NUQSGDState:
    """State of `nuqsgd_hook`: the settings, step counter and residuals of one rank.

    Picklable: process groups, threads and buffers are left out and made again at the next call.

    Args:
        process_group: The ranks that synchronize; the default group if None. With subgroups, every rank of
            the default group has to be in one: torch names new groups by counting calls.
        module: Gives parameters their names, by which residuals are kept; without it they are
            numbered in the order in which DDP first hands them over.
        codec: Replaces the codec made from the settings, in both phases (for example
            `IdentityCodec()`, with which the exchange reproduces plain DDP).
        timeout: How long the exchange's process groups wait for a peer before they fail; torch's default if
            None.
        config: The settings; made from the keywords if None.
        **settings: Fields of `ExchangeConfig`, such as `bits`, `bucket_size`, `norm`, `levels`, `scheme`,
            `error_feedback`.

    Attributes:
        step: Synchronized steps so far.

    Raises:
        ValueError: If a setting is not allowed or `module` is sharded.
        TypeError: If a setting is unknown.

    Example:
        >>> state = NUQSGDState(bits=4, bucket_size=1024)
        >>> state.step
        0
    """

    __slots__ = (
        "__weakref__",
        "_adaptation",
        "_codecs",
        "_exchange",
        "_names",
        "_resume_layout",
        "config",
        "process_group",
        "residuals",
        "step",
        "timeout",
    )

    activity = "gradient exchange of step"  # how failure reports call an exchange, before its number

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
        self.residuals = Residuals()  # those that no plan holds yet
        self._resume_layout: ResumeLayout | None = None
        self._codecs = (self.config.codec(), self.config.second_codec()) if codec is None else (codec, codec)
        self._adaptation = self._make_adaptation()
        self._exchange: Exchange | None = None
        self._names: dict[int, str] = {}
        if module is not None:
            self.bind(module)
        elif self.config.skip_patterns:
            raise ValueError(f"skip_patterns: got {self.config.skip_patterns!r}, allowed with module only")

    def _make_adaptation(self) -> LevelAdaptation:
        return LevelAdaptation(self._codecs, self.config.adapt_every, self.config.warmup_steps)

    def bind(self, module: nn.Module) -> None:
        """Learns the parameters' names.

        Raises:
            ValueError: If the module is sharded or a pattern matches nothing.
        """
        refuse_sharded(module)
        self._names = {id(parameter): plain_name(name) for name, parameter in module.named_parameters()}
        self.config.check_patterns(self._names.values())

    @property
    def world_size(self) -> int:
        """The number of ranks that synchronize."""
        return dist.get_world_size(self.process_group)

    @property
    def stats(self) -> ExchangeStats | None:
        """The counters; None before the first exchange and with one rank."""
        return None if self._exchange is None else self._exchange.stats

    def connect(self, device: torch.device) -> None:
        """Joins the other ranks: handshake, process groups, threads.

        A collective call; the first hook call makes it if nobody did before.

        Raises:
            ValueError: On every rank, if two ranks disagree on a setting.
        """
        if self._exchange is None and self.world_size > 1:
            self._exchange = connect(
                self.config, self._codecs, self.process_group, device, self.timeout, self.facts()
            )
            self._exchange.activity = self.activity

    def facts(self) -> dict[str, Any]:
        """Returns what has to be equal on all ranks beside the settings of the exchange."""
        return {"step": self.step}

    def synchronize(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """Starts averaging a bucket over the ranks; what the hook does once it has checked the bucket."""
        buffer, last, step = bucket.buffer(), bucket.is_last(), self.step
        self.step += last
        self.connect(buffer.device)
        if self._exchange is None:  # one rank alone
            future: torch.futures.Future[Tensor] = torch.futures.Future()
            future.set_result(buffer)
            return future
        if self._resume_layout is None:
            return self._start(self._exchange, step, bucket.index(), bucket.parameters(), buffer, last)
        held = self._resume_layout.hold(bucket, [self._name(parameter) for parameter in bucket.parameters()])
        if last:
            self._release(self._exchange, self._resume_layout, step)
        return held

    def _start(
        self,
        exchange: Exchange,
        step: int,
        index: int,
        parameters: Sequence[Tensor],
        buffer: Tensor,
        last: bool,
    ) -> torch.futures.Future[Tensor]:
        plan = self._plan(exchange, step, index, parameters, buffer.dtype)
        due = self._adaptation.due(step)
        if due:
            self._adaptation.observe([buffer[p.span.slice] for p in plan.places if not p.exact])
        future = exchange.start(plan, buffer, step, last)
        if due:
            self._adaptation.await_bucket(future, last, self.process_group)
        return future

    def _plan(
        self, exchange: Exchange, step: int, index: int, parameters: Sequence[Tensor], dtype: torch.dtype
    ) -> BucketPlan:
        """Returns the bucket's plan, a new one where DDP rebuilt the buckets or warm-up ended."""
        warm = step < self.config.warmup_steps
        key = (warm, dtype, *map(id, parameters))
        plan = exchange.plans.get(index)
        if plan is not None and plan.key == key:
            return plan
        if plan is not None:
            self._retire(exchange)
        first, second = (codec_at_step(codec, step, self.config.warmup_steps) for codec in self._codecs)
        places = place_parameters(parameters, self._name, self._travels_exactly)
        plan = exchange.plan(index, key, places, (first, second), dtype)
        self.residuals.move_into(plan)
        return plan

    def _release(self, exchange: Exchange, held: ResumeLayout, step: int) -> None:
        """Exchanges the first step after a resume: in the checkpoint's layout, unless things changed."""
        self._resume_layout = None
        layout, saved = held.own_layout(), self.residuals.layout
        if self.residuals.geometry == self._geometry() and _names_in(saved) == _names_in(layout):
            layout = saved
        else:
            self.residuals.make_pending()
        held.release(layout, lambda *bucket: self._start(exchange, step, *bucket))

    def _geometry(self) -> dict[str, Any]:
        return {**self.config.geometry(), "world_size": self.world_size}

    def _retire(self, exchange: Exchange) -> None:
        """Drops all plans; residuals become pending, because no old bucket survives a rebuild."""
        self.residuals = self._all_residuals()
        self.residuals.make_pending()
        exchange.plans.clear()

    def _all_residuals(self) -> Residuals:
        """Returns the residuals kept here and in the plans."""
        plans = self._plans()
        found = self.residuals.with_those_of(plans if self.config.error_feedback else [])
        if plans:
            found.layout, found.geometry = as_layout(plan.names for plan in plans), self._geometry()
        return found

    def _plans(self) -> list[BucketPlan]:
        plans = {} if self._exchange is None else self._exchange.plans
        return [plans[index] for index in sorted(plans)]

    def rebuilt(self, buckets: Sequence[GradBucket]) -> None:
        """Learns that DDP rebuilt its buckets before the next step, of which the hook will see them.

        Where they are those that the plans were made for, as after the first step of a resumed run, nothing
        changes.

        Args:
            buckets: The buckets as they are now.
        """
        layout = as_layout([self._name(p) for p in bucket.parameters()] for bucket in buckets)
        if self._exchange is not None and layout != as_layout(plan.names for plan in self._plans()):
            self._retire(self._exchange)
            self.residuals.layout, self.residuals.geometry = layout, self._geometry()

    def _name(self, parameter: Tensor) -> str:
        return self._names.setdefault(id(parameter), f"parameter{len(self._names)}")

    def _travels_exactly(self, parameter: Tensor) -> bool:
        return self.config.travels_exactly(self._name(parameter), parameter)

    @property
    def status(self) -> str:
        """What other ranks hear about this one if the exchange fails; set it to tell them more."""
        return "start" if self._exchange is None else self._exchange.report.status

    @status.setter
    def status(self, text: str) -> None:
        if self._exchange is not None:
            self._exchange.report.status = text

    def report(self, error: BaseException) -> str:
        """Tells the other ranks that this one ends by `error`; asks them first whether they are the cause.

        Call it where a training loop ends by an error. Takes a few seconds at most.

        Returns:
            What is known of the cause on other ranks, an empty string if nothing.
        """
        return "" if self._exchange is None else self._exchange.report.report(error)

    def close(self) -> None:
        """Keeps the residuals and ends the threads; a later exchange connects again."""
        if self._exchange is not None:
            self._retire(self._exchange)
            self._exchange.close()
            self._exchange = None

    def state_dict(self) -> dict[str, Any]:
        """Returns the state: `step`, `seed`, adapted `levels`; in `owed` residuals and buckets' layout."""
        return {
            "step": self.step,
            "seed": self.config.seed,
            "levels": self._adaptation.state(),
            "owed": self._all_residuals().state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict` of this rank; call it before training goes on.

        Random numbers are a function of seed, rank, step and place in the layout of the buckets, so the
        step and the layout are all that is needed to continue them; the seed is that of the settings.
        The next step uses the saved layout, later ones DDP's, which comes out the same. Where settings or
        parameters changed, DDP's layout is used from the start.
        """
        if self._exchange is not None:
            self._exchange.plans.clear()  # with the residuals that are replaced here
        self.step = int(state["step"])
        self._adaptation.restore(state.get("levels", []))  # earlier revisions saved none
        self.residuals = Residuals.restore(state["owed"])
        self._resume_layout = ResumeLayout() if self.residuals.layout else None

    def __getstate__(self) -> dict[str, Any]:
        """Returns everything but process groups, threads and the identities of parameters."""
        return {
            "config": self.config,
            "timeout": self.timeout,
            "codecs": self._codecs,
            "state": self.state_dict(),
        }

    def __setstate__(self, saved: dict[str, Any]) -> None:
        """Restores; the default process group is used, and `bind` gives parameters their names again."""
        self.config, self.timeout, self._codecs = saved["config"], saved["timeout"], saved["codecs"]
        self.process_group, self._exchange, self._names = None, None, {}
        self._adaptation = self._make_adaptation()
        self.load_state_dict(saved["state"])


def nuqsgd_hook(state: NUQSGDState, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Averages a bucket's gradients over the ranks by exchanging quantized messages.

    Returns at once; encoding, exchange and decoding overlap with the backward pass. The mean is
    unbiased, and the same bits on every rank. A NaN or infinity on any rank makes the coordinates
    that share its norm NaN on all ranks.

    Ramezani-Kebrya et al., "NUQSGD", JMLR 22(114), 2021, arXiv 1908.06077.

    Args:
        state: The state, one per DDP module.
        bucket: Dense gradients of any floating dtype.

    Returns:
        Future of the bucket's buffer, overwritten by the mean.

    Raises:
        ValueError: If `bucket` comes from FSDP or holds sparse gradients, or ranks disagree on settings.
    """
    if not isinstance(bucket, GradBucket):  # FSDP hands hooks plain tensors
        raise ValueError(f"bucket: got {type(bucket).__name__}, allowed is DDP's GradBucket: {_ADVICE}")
    if bucket.buffer().layout != torch.strided:
        raise ValueError(
            "bucket: got sparse gradients, allowed are dense ones: set sparse=False in the embedding"
        )
    return state.synchronize(bucket)


def refuse_sharded(module: nn.Module) -> None:
    """Raises if gradients of the module are sharded or exchanged by somebody else (DeepSpeed)."""
    kind = type(module).__name__
    if any(isinstance(part, FullyShardedDataParallel) for part in module.modules()):
        kind = "FullyShardedDataParallel"
    elif is_sharded(module):
        kind = "a module with DTensor parameters"
    elif not any(base.__name__ == "DeepSpeedEngine" for base in type(module).__mro__):
        return
    raise ValueError(f"module: got {kind}, which is sharded: {_ADVICE}")


def _names_in(layout: Layout) -> list[str]:
    return sorted(name for names in layout for name in names)


def plain_name(name: str) -> str:
    """Returns a parameter's name without the prefixes of wrappers, which checkpoints must not depend on."""
    return name.removeprefix("module.").replace("_orig_mod.", "")
