"""The settings, the step and the counters of sharded training, and how they are put into a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lightning_n2uq._version import __version__
from lightning_n2uq.compression import Codec, IdentityCodec, NUQCodec, codec_at_step, mix_seed
from lightning_n2uq.distributed.collectives import (
    Collectives,
    ExchangeGroups,
    ProcessCollectives,
    process_groups,
    shake_hands,
)
from lightning_n2uq.distributed.config import ExchangeConfig
from lightning_n2uq.distributed.failure_report import FailureReport
from lightning_n2uq.distributed.hook import plain_name
from lightning_n2uq.distributed.sharded.attach import copy_to_replicas, install, require_shards
from lightning_n2uq.distributed.sharded.comm import (
    CompressedAllGather,
    CompressedAllReduce,
    CompressedReduceScatter,
)
from lightning_n2uq.distributed.sharded.messages import FlatLayout, flat_layout
from lightning_n2uq.distributed.sharded.settings import check_settings
from lightning_n2uq.distributed.sharded.stats import ShardedStats
from lightning_n2uq.utils import compat
from lightning_n2uq.utils.compat_fsdp import at_end_of_backward, backward_number, parameters_in_flight


class ShardedState:
    """Compresses the collectives of a model that `fully_shard` has sharded.

    Use it in plain PyTorch by `attach`, or hand its objects to single modules. A step is a backward pass that
    reduces gradients; random numbers are a function of seed, rank, step and parameter, so `state_dict` holds
    no more than the step.

    Args:
        param_bits: 8 gathers parameters in 8 bits, None in full precision.
        codec: Replaces the gradient codec made from the settings (for example `IdentityCodec()`).
        timeout: How long process groups made here wait for a peer; torch's default if None.
        config: The settings; made from the keywords if None.
        **settings: Fields of `ExchangeConfig` that mean something here, such as `bits`, `bucket_size`,
            `norm`, `levels`, `min_numel`, `skip_patterns`, `warmup_steps`.

    Attributes:
        step: Backward passes that have reduced gradients so far.
        stats: The counters.

    Raises:
        ValueError: If a setting is not allowed.

    Example:
        >>> state = ShardedState(bits=4, param_bits=8)
        >>> state.step
        0
    """

    def __init__(
        self,
        param_bits: int | None = None,
        *,
        codec: Codec | None = None,
        timeout: timedelta | None = None,
        config: ExchangeConfig | None = None,
        **settings: Any,  # noqa: ANN401  # typed by ExchangeConfig, which refuses unknown names
    ) -> None:
        self.config = replace(config, **settings) if config is not None else ExchangeConfig(**settings)
        check_settings(self.config, param_bits)
        self.param_bits, self.timeout = param_bits, timeout
        self.step, self.stats = 0, ShardedStats()
        self._codecs = (self.config.codec(), self.config.second_codec()) if codec is None else (codec, codec)
        self._parameter_codec = None if param_bits is None else self._codec_of_parameters(param_bits)
        self._names: dict[nn.Module, str] = {}
        self._replicas = 1
        self._report: FailureReport | None = None
        self._closed = False
        self._collectives: dict[dist.ProcessGroup, Collectives] = {}
        self._backward = -1

    def _codec_of_parameters(self, bits: int) -> Codec:
        return NUQCodec(bits, self.config.bucket_size, "linf", "uniform")

    # Putting it into a model

    def attach(self, module: nn.Module, replicas: Sequence[int] | None = None) -> None:
        """Compresses all collectives of a sharded model. A collective call.

        Args:
            module: A model after `fully_shard`.
            replicas: The global ranks that hold the same shards as this one, for models that are sharded over
                a mesh without them: gradients are then reduced in full precision inside that mesh and
                compressed between the replicas, which start with the parameters of the first.

        Raises:
            ValueError: If no part of the module is sharded, a pattern matches nothing, or a setting means
                nothing here.
        """
        parts = require_shards(module, replicas)
        check_settings(self.config, self.param_bits, replicas is not None)
        self.bind(module)
        self._replicas = 1 if replicas is None else len(replicas)
        self._closed = False
        self.connect(next(module.parameters()).device)
        hook = None if replicas is None else CompressedAllReduce(self, replicas)
        scatter, gather = CompressedReduceScatter(self, compress=hook is None), CompressedAllGather(self)
        install(parts, scatter, gather, hook, needs_gather=self.param_bits is not None)
        if hook is not None and hook.group is not None:
            copy_to_replicas(module, hook.group)

    def bind(self, module: nn.Module) -> None:
        """Learns the parameters' names.

        Raises:
            ValueError: If a pattern matches nothing.
        """
        self._names = {part: _plain(f"{name}.") if name else "" for name, part in module.named_modules()}
        self.config.check_patterns(_plain(name) for name, _ in module.named_parameters())

    def connect(self, device: torch.device) -> None:
        """Compares the settings of all ranks; the first collective does it if nobody did before.

        Raises:
            ValueError: On every rank, if two ranks disagree on a setting.
        """
        if self._report is None and not self._closed and dist.get_world_size() > 1:
            ranks = range(dist.get_world_size())
            name = shake_hands(self._record(), None, device)
            self._report = FailureReport(name, ranks, dist.get_rank(), compat.default_store())

    def _record(self) -> dict[str, Any]:
        """Returns what the ranks compare before the first message."""
        return self.config.fields() | {
            "version": __version__,
            "codec": self._codecs[0].describe(),
            "second_codec": self._codecs[1].describe(),
            "param_bits": self.param_bits,
            "replicas": self._replicas,
            "step": self.step,
        }

    # What the collectives ask

    @contextmanager
    def collective(self, device: torch.device) -> Iterator[None]:
        """Surrounds a collective: connects before the first, and names the rank that a failure began with."""
        self.connect(device)
        if self._report is not None:
            self._report.handed_over += 1
        try:
            yield
        except RuntimeError as error:
            if self._report is None:
                raise
            raise self._report.explain(error) from error

    def layout(self, numel: int) -> FlatLayout:
        """Returns the layout of the flat tensor of the collective under way, `numel` coordinates per rank."""
        return flat_layout(parameters_in_flight(), numel, self._name, self.config.travels_exactly)

    def begin_gradient(self, coordinates: int) -> None:
        """Notes that gradients are reduced; the step ends with the backward pass."""
        self.stats.add(coordinates=coordinates)
        number = backward_number()
        if number not in (-1, self._backward):
            self._backward = number
            self.status = f"gradient exchange of step {self.step}"
            at_end_of_backward(self._end_step)

    def _end_step(self) -> None:
        self.stats.close_step(self.step)
        self.status = f"work after the gradient exchange of step {self.step}"
        self.step += 1
        self._backward = -1

    def gradient_codecs(self) -> tuple[Codec, Codec]:
        """Returns the codecs of gradients in this step."""
        first, second = (codec_at_step(codec, self.step, self.config.warmup_steps) for codec in self._codecs)
        return first, second

    def parameter_codec(self) -> Codec | None:
        """Returns the codec of parameters in this step; None where they travel in full precision."""
        if self._parameter_codec is None:
            return None
        codec = codec_at_step(self._parameter_codec, self.step, self.config.warmup_steps)
        return None if isinstance(codec, IdentityCodec) else codec

    def seed(self, number: int) -> int:
        """Returns the seed of this rank's message of a number, in this step."""
        return mix_seed(self.config.seed, dist.get_rank(), self.step, number)

    def collectives(self, group: dist.ProcessGroup) -> Collectives:
        """Returns the counting collectives of a group that FSDP2 uses."""
        if group not in self._collectives:
            self._collectives[group] = ProcessCollectives(group)
        return self._collectives[group]

    def replica_groups(self, ranks: Sequence[int]) -> ExchangeGroups:
        """Returns the process groups of the exchange between replicas. A collective call of these ranks."""
        return process_groups(list(ranks), self.config, self.timeout, shared=True, vary=False)

    def _name(self, module: nn.Module, name: str) -> str:
        return self._names.setdefault(module, f"module{len(self._names)}.") + name

    # Failures, checkpoints

    @property
    def status(self) -> str:
        """What other ranks hear about this one if a collective fails; set it to tell them more."""
        return "start" if self._report is None else self._report.status

    @status.setter
    def status(self, text: str) -> None:
        if self._report is not None:
            self._report.status = text

    def report(self, error: BaseException) -> str:
        """Tells the other ranks that this one ends by `error`; returns what is known of causes elsewhere."""
        return "" if self._report is None else self._report.report(error)

    def close(self) -> None:
        """Ends the thread that answers other ranks' questions; a later failure names no rank."""
        self._closed = True
        if self._report is not None:
            self._report.close()
            self._report = None

    def state_dict(self) -> dict[str, Any]:
        """Returns the state, equal on all ranks: `step` and `seed`."""
        return {"step": self.step, "seed": self.config.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`, on any number of ranks; the seed is that of the settings."""
        self.step = int(state["step"])


def _plain(name: str) -> str:
    """Returns a parameter's name without the prefixes of wrappers, gradient checkpointing's included."""
    return plain_name(name).replace("_checkpoint_wrapped_module.", "")
