"""Fewer exchanges: every rank trains alone for some steps, then the change of its weights is exchanged.

A round, step by step:

1. Every rank takes `period` optimizer steps on its own data; nothing travels.
2. Its change, the agreed weights minus its own, goes through the exchange of `exchange`, in which gradients
   travel elsewhere: encoded, averaged in rank order in fp32, encoded, the same bytes for all.
3. An outer optimizer (SGD with Nesterov momentum) applies the mean to the agreed weights, alike on all ranks.
4. Every rank goes on from them, with its own inner optimizer.

Running statistics are averaged before step 2. Local SGD: Stich, ICLR 2019, arXiv 1805.09767; DiLoCo:
Douillard et al., 2023, arXiv 2311.08105.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_n2uq.compression import Codec
from lightning_n2uq.distributed.agreed_buffers import AgreedBuffers, copy_from_first
from lightning_n2uq.distributed.agreed_weights import AgreedWeights, LocalConfig
from lightning_n2uq.distributed.config import take_fields
from lightning_n2uq.distributed.flat_bucket import FlatBucket
from lightning_n2uq.distributed.hook import NUQSGDState, plain_name
from lightning_n2uq.utils.validation import check


class LocalState(NUQSGDState):
    """The state of the exchange of rounds: as `NUQSGDState`, whose steps are rounds here.

    Args:
        local: The settings of the rounds, compared by the handshake.
        **arguments: Those of `NUQSGDState`.

    Attributes:
        trained: What is trained, in words, compared by the handshake.
    """

    __slots__ = ("local", "trained")
    activity = "exchange of round"

    def __init__(self, local: LocalConfig, **arguments: Any) -> None:  # noqa: ANN401  # typed by NUQSGDState
        self.local, self.trained = local, ""
        super().__init__(**arguments)

    def facts(self) -> dict[str, Any]:
        """Returns what has to be equal on all ranks beside the settings of the exchange."""
        return self.local.facts() | {"trained": self.trained} | super().facts()

    @contextlib.contextmanager
    def explaining(self, status: str) -> Iterator[None]:
        """Names the rank that is missing where a collective of the training thread fails."""
        self.status = status
        try:
            yield
        except RuntimeError as error:
            if self._exchange is None or "gradient exchange failed" in str(error):
                raise
            raise self._exchange.report.explain(error) from error

    def count(self, coordinates: int) -> None:
        """Counts coordinates that an all-reduce in fp32 averages beside the exchange."""
        if self.stats is not None:
            self.stats.begin(coordinates)
            self.stats.add(sent_bytes=int(8 * coordinates * (self.world_size - 1) / self.world_size))

    def __getstate__(self) -> dict[str, Any]:
        """Returns everything but process groups, threads and the identities of parameters."""
        return super().__getstate__() | {"local": self.local}

    def __setstate__(self, saved: dict[str, Any]) -> None:
        """Restores; see `NUQSGDState`."""
        self.local, self.trained = saved["local"], ""
        super().__setstate__(saved)


class LocalRounds:
    """Trains a module in rounds; the loop calls `step` after every step of its optimizer.

    Parameters that are not trained do not travel; 1-D and small ones travel in full precision. One rank alone
    sends nothing, and only an outer optimizer that does more than average changes its weights.

    Args:
        module: The module, without a wrapper that exchanges gradients.
        process_group: The ranks; the default group if None.
        codec: Replaces the codec made from the settings, in both phases.
        timeout: How long the exchange waits for a peer before it fails; torch's default if None.
        local: The settings of the rounds; made from the keywords if None.
        **settings: Fields of `LocalConfig` and `ExchangeConfig`, such as `period`, `outer_lr`, `bits`.

    Attributes:
        state: The exchange, its counters and its residuals.
        steps: The steps of the present round so far.

    Raises:
        ValueError: If a setting is not allowed, or the module has a `SyncBatchNorm`.

    Example:
        >>> rounds = LocalRounds(nn.Linear(4, 2), period=100, outer_lr=0.7, outer_momentum=0.9, bits=4)
        >>> rounds.steps
        0
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        process_group: dist.ProcessGroup | None = None,
        codec: Codec | None = None,
        timeout: timedelta | None = None,
        local: LocalConfig | None = None,
        **settings: Any,  # noqa: ANN401  # typed by the two configs, which refuse unknown names
    ) -> None:
        own = take_fields(LocalConfig, settings)
        self.local = local or LocalConfig(**own)
        refuse_sync_batch_norm(module)
        self.module, self.steps = module, 0
        self.state = LocalState(
            self.local, process_group=process_group, module=module, codec=codec, timeout=timeout, **settings
        )
        self._weights, self._buffers = AgreedWeights(self.local), AgreedBuffers(module)
        self._device: torch.device | None = None

    @property
    def _trained(self) -> dict[str, nn.Parameter]:
        named = self.module.named_parameters()
        return {plain_name(name): parameter for name, parameter in named if parameter.requires_grad}

    @property
    def _together(self) -> bool:
        """Whether there are other ranks."""
        return dist.is_available() and dist.is_initialized() and self.state.world_size > 1

    def start(self, device: torch.device) -> None:
        """Joins the other ranks and gives all of them the first one's weights. A collective call.

        Call it before the first step.

        Args:
            device: The device on which the ranks communicate.

        Raises:
            ValueError: On every rank, if two ranks disagree on a setting.
        """
        self._device, trained = device, self._trained
        if self._together:
            numel = sum(parameter.numel() for parameter in trained.values())
            self.state.trained = f"{len(trained)} parameters of {numel} elements"
            self.state.connect(device)
            with self.state.explaining("start of the first round"):
                copy_from_first(
                    [*self.module.parameters(), *self.module.buffers()], self.state.process_group, device
                )
        self._weights.follow(trained)
        self._buffers.follow()

    def follow(self) -> None:
        """Follows parameters that training has begun with since: unfrozen, new or replaced ones.

        Call it before the first step with them. A collective call where there are any; they start from the
        first rank's values.
        """
        unknown = self._weights.unknown(self._trained)
        if not unknown or self._device is None:
            return
        if self._together:
            with self.state.explaining("arrival of new parameters"):
                copy_from_first(unknown.values(), self.state.process_group, self._device)
        self.state.bind(self.module)
        self._weights.follow(unknown)

    def step(self) -> bool:
        """Counts a step of this rank's; the last one of a period ends the round.

        Returns:
            Whether it did.

        Raises:
            RuntimeError: Before `start`.
        """
        if self._device is None:
            raise RuntimeError("step: LocalRounds has not started, call start(device) before training")
        self.steps += 1
        if self.steps < self.local.period:
            return False
        self.close()
        return True

    def close(self) -> None:
        """Ends the present round, also a short one, unless it has no step yet. A collective call.

        Afterwards the weights, the running statistics and all other buffers are the same bits on every rank.

        Raises:
            RuntimeError: If another rank is lost; the message names it.
        """
        if not self.steps or self._device is None:
            return
        together = self._together
        if together:
            with self.state.explaining(f"{self.state.activity} {self.state.step}"):
                self.state.count(self._buffers.average(self.state.process_group, self._device))
        if self._weights.parameters and (together or not self.local.averages):
            mean = self._weights.change()
            if together:
                change: Any = FlatBucket(self._weights.parameters, mean)
                mean = self.state.synchronize(change).wait()
            self._weights.advance(mean)
        self.steps = 0
        self._weights.forget_all_but(self._trained)

    @contextlib.contextmanager
    def agreed_values(self) -> Iterator[None]:
        """Lets the module have the agreed values inside, in the middle of a round."""
        own = self.own_state()
        if self.steps:
            self._weights.give()
            self._buffers.give()
        try:
            yield
        finally:
            self._take(own)

    def own_state(self) -> dict[str, dict[str, Tensor]]:
        """Returns what this rank has of its own in the middle of a round; empty between two rounds."""
        if not self.steps:
            return {"parameters": {}, "buffers": {}}
        return {"parameters": self._weights.own(), "buffers": self._buffers.own()}

    def _take(self, own: Mapping[str, Mapping[str, Tensor]]) -> None:
        self._weights.take(own["parameters"])
        self._buffers.take(own["buffers"])

    def state_dict(self) -> dict[str, Any]:
        """Returns what all ranks have in common beside the module's values: steps and outer optimizer."""
        return {"steps": self.steps, **self._weights.state_dict()}

    def load_state_dict(
        self, state: Mapping[str, Any], own: Mapping[str, Mapping[str, Tensor]] | None = None
    ) -> None:
        """Continues; call it after `start`, while the module has the values that were agreed on.

        Args:
            state: From `state_dict`.
            own: From `own_state`, of this rank; None begins a new round.
        """
        self._weights.load_state_dict(state)
        self.steps = 0 if own is None else int(state["steps"])
        if own is not None:
            self._take(own)

    def end(self) -> None:
        """Ends the exchange's threads."""
        self.state.close()


def refuse_sync_batch_norm(module: nn.Module) -> None:
    """Raises if a layer of the module waits for all ranks in every step."""
    names = [name for name, part in module.named_modules() if isinstance(part, nn.SyncBatchNorm)]
    allowed = "are networks without it: ranks train alone, and average the running statistics of plain ones"
    check(not names, "module", f"SyncBatchNorm {', '.join(names[:3])}", allowed)
