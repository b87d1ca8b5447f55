"""Ranks of one process that exchange gradients as real ones do: the same messages, the same bytes.

What a rank does is the code of `exchange` and `phases`. Only messages travel otherwise: ranks take turns,
stage by stage, so that whatever a stage sends is there when the next one wants it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_n2uq.compression import Codec
from lightning_n2uq.distributed.adaptation import LevelAdaptation
from lightning_n2uq.distributed.collectives import Collectives, ExchangeGroups
from lightning_n2uq.distributed.exchange import Exchange, sizes_vary
from lightning_n2uq.distributed.flat_bucket import FlatBucket
from lightning_n2uq.distributed.hook import NUQSGDState
from lightning_n2uq.distributed.pipeline import Task
from lightning_n2uq.distributed.stats import ExchangeStats
from lightning_n2uq.utils.validation import check, check_integer

Post = tuple[Tensor, Sequence[int]]
"""What a rank sends, and the length of the piece for every rank."""


class SimulatedCollectives(Collectives):
    """Collectives among ranks that take turns: all of them send before the first one waits.

    Args:
        rank: This rank among those that take part.
        posts: What each of them has sent last, of messages and of their sizes; the members share the lists.
    """

    def __init__(self, rank: int, posts: tuple[list[Post], list[Post]]) -> None:
        super().__init__(rank, len(posts[0]))
        self._messages, self._sizes = posts

    def _all_to_all(
        self, recv: Tensor, send: Tensor, recv_sizes: list[int], send_sizes: list[int]
    ) -> Arrival:
        self._messages[self.rank] = (send, send_sizes)
        return Arrival(lambda: self._receive(recv, self._messages))

    def _all_gather(self, recv: Tensor, send: Tensor) -> Arrival:
        self._messages[self.rank] = (send, ())
        return Arrival(lambda: torch.cat([sent for sent, _ in self._messages], out=recv))

    def _announce_sizes(self, theirs: Tensor, mine: Tensor) -> Arrival:
        self._sizes[self.rank] = (mine, [1] * self.size)
        return Arrival(lambda: self._receive(theirs, self._sizes))

    def _receive(self, recv: Tensor, posts: Sequence[Post]) -> Tensor:
        pieces = [sent.split(list(lengths))[self.rank] for sent, lengths in posts]
        return torch.cat(pieces, out=recv)


@dataclass(frozen=True)
class Arrival:
    """A message that waits at its receiver.

    Attributes:
        take: Copies it to where it is wanted.
    """

    take: Callable[[], Tensor]

    def wait(self) -> None:
        """Copies it to where it is wanted."""
        self.take()


class TakingTurns:
    """Takes the units of all ranks through their stages, one stage after the other.

    Args:
        ranks: The number of ranks.
    """

    def __init__(self, ranks: int) -> None:
        self.stages = 0
        self.tasks: list[list[Task]] = [[] for _ in range(ranks)]

    def run(self) -> None:
        """Runs all that was handed over, units in their order."""
        tasks, self.tasks = self.tasks, [[] for _ in self.tasks]
        for same_unit in zip(*tasks, strict=True):
            for stage in range(self.stages):
                for task in same_unit:
                    task.run(stage)


class _Place:
    """Where one rank hands its units over."""

    def __init__(self, turns: TakingTurns, rank: int, stages: int) -> None:
        self._turns, self._rank = turns, rank
        turns.stages = stages

    def submit(self, task: Task) -> None:
        """Keeps a unit until it is this rank's turn."""
        self._turns.tasks[self._rank].append(task)

    def close(self) -> None:
        """Has no threads to end."""


class _NoPeers:
    """Where ranks are no processes a failure is everybody's, and is raised as it is."""

    status, handed_over = "start", 0

    def explain(self, error: BaseException) -> BaseException:
        """Returns the error."""
        return error

    def report(self, error: BaseException) -> str:
        """Has nobody to tell."""
        return ""

    def close(self) -> None:
        """Has no thread to end."""


class _TogetherAdaptation(LevelAdaptation):
    """Levels that follow the gradients of all ranks, which the simulation adds up."""

    def await_bucket(
        self, future: torch.futures.Future[Tensor], last: bool, group: dist.ProcessGroup | None
    ) -> None:
        """Leaves it to the simulation, which knows when all ranks are done."""


class _RankState(NUQSGDState):
    """The state of one simulated rank; `connect` has the simulation's exchange."""

    __slots__ = ("_connect", "_ranks")

    def __init__(self, ranks: int, connect: Callable[[torch.device], Exchange], **arguments: Any) -> None:  # noqa: ANN401
        self._ranks, self._connect = ranks, connect
        super().__init__(**arguments)

    def _make_adaptation(self) -> _TogetherAdaptation:
        return _TogetherAdaptation(self._codecs, self.config.adapt_every, self.config.warmup_steps)

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return self._ranks

    @property
    def adaptation(self) -> LevelAdaptation:
        """What counts this rank's gradients."""
        return self._adaptation

    @property
    def vary(self) -> bool:
        """Whether messages vary in size."""
        return sizes_vary(self._codecs)

    def connect(self, device: torch.device) -> None:
        """Has an exchange from now on."""
        if self._exchange is None:
            self._exchange = self._connect(device)


class SimulatedExchange:
    """Averages the gradients of ranks that are all in this process, by `ExchangeConfig`'s exchange.

    Every rank has its own random numbers, residuals and messages; the mean is what real ranks would get, bit
    for bit, for the same gradients in the same order of parameters. All parameters share one bucket in their
    reverse order, which is how DDP lays out modules up to 1 MiB from the second step on; it cuts the
    gradients of larger ones elsewhere.

    Args:
        ranks: The number of ranks, 2 or more.
        module: Gives parameters their names; those that require gradients are exchanged.
        codec: Replaces the codec made from the settings, in both phases.
        **settings: The fields of `ExchangeConfig`, or `config`.

    Raises:
        ValueError: If a setting is not allowed.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> exchange = SimulatedExchange(2, layer, min_numel=8)
        >>> exchange.average([[torch.tensor([[1.0, 2.0]])], [torch.tensor([[3.0, 0.0]])]])
        [tensor([[2., 1.]])]
    """

    def __init__(self, ranks: int, module: nn.Module, *, codec: Codec | None = None, **settings: Any) -> None:  # noqa: ANN401
        self.ranks = check_integer("ranks", ranks, 2)
        self._turns = TakingTurns(ranks)
        self._posts: dict[tuple[int, ...], list[tuple[list[Post], list[Post]]]] = {}
        self._parameters = [p for p in module.parameters() if p.requires_grad][::-1]
        self._states = [
            _RankState(ranks, self._connector(rank), module=module, codec=codec, **settings)
            for rank in range(ranks)
        ]

    def _connector(self, rank: int) -> Callable[[torch.device], Exchange]:
        def connect(device: torch.device) -> Exchange:
            state = self._states[rank]
            config, vary = state.config, state.vary
            groups = ExchangeGroups(range(self.ranks), rank, config, vary, self._join(rank))
            place = partial(_Place, self._turns, rank)
            return Exchange(config, groups, device, vary, _NoPeers(), place)

        return connect

    def _join(self, rank: int) -> Callable[[list[int], int, bool], list[SimulatedCollectives]]:
        def join(members: list[int], count: int, vary: bool) -> list[SimulatedCollectives]:
            if len(members) == 1:
                return []
            nothing: Post = (torch.empty(0), ())
            shared = self._posts.setdefault(
                tuple(members), [([nothing] * len(members), [nothing] * len(members)) for _ in range(count)]
            )
            return [SimulatedCollectives(members.index(rank), posts) for posts in shared]

        return join

    def connect(self, device: torch.device) -> ExchangeStats:
        """Connects the ranks, which the first exchange does otherwise; returns the counters of the first one.

        Args:
            device: The device of the gradients.
        """
        for state in self._states:
            state.connect(device)
        stats = self._states[0].stats
        if stats is None:
            raise RuntimeError("the ranks are connected, and have counters")
        return stats

    def average(self, gradients: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Exchanges one step's gradients.

        Args:
            gradients: One list per rank, of a tensor per trained parameter in the module's order and in the
                parameter's shape, of one floating dtype.

        Returns:
            What every rank gets: the mean, one tensor per parameter.

        Raises:
            ValueError: If there are not as many lists as ranks, or a gradient is sparse.
        """
        if len(gradients) != self.ranks:
            raise ValueError(f"gradients: got {len(gradients)} lists, allowed is one per rank, {self.ranks}")
        if any(one.layout != torch.strided for own in gradients for one in own):
            raise ValueError(
                "gradients: got sparse ones, allowed are dense ones: set sparse=False in the embedding"
            )
        buckets = [
            FlatBucket(self._parameters, torch.cat([one.reshape(-1) for one in reversed(own)]))
            for own in gradients
        ]
        for state, bucket in zip(self._states, buckets, strict=True):
            state.synchronize(bucket)  # type: ignore[arg-type]  # used as one of DDP's
        self._turns.run()
        self._adapt()
        return buckets[0].gradients()[::-1]

    def _adapt(self) -> None:
        """Adapts levels to what all ranks have counted, if it is the step for it."""
        counts = [found for state in self._states if (found := state.adaptation.take_counts()) is not None]
        if counts:
            for state in self._states:
                state.adaptation.adapt(torch.stack(counts).sum(0))

    def state_dict(self) -> dict[str, Any]:
        """Returns every rank's step counter, levels and residuals."""
        return {"ranks": [state.state_dict() for state in self._states]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from `state_dict`.

        Raises:
            ValueError: If it is of another number of ranks.
        """
        saved = state["ranks"]
        check(len(saved) == self.ranks, "ranks", self.ranks, f"is the checkpoint's number, {len(saved)}")
        for own, one in zip(self._states, saved, strict=True):
            own.load_state_dict(one)
