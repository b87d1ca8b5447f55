"""The running half of an exchange: process groups, threads, plans. Nothing here is saved."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_n2uq._version import __version__
from lightning_n2uq.compression import Codec, mix_seed
from lightning_n2uq.distributed.answer import Answer, Notice
from lightning_n2uq.distributed.chain import Chain, build_legs
from lightning_n2uq.distributed.config import ExchangeConfig
from lightning_n2uq.distributed.handshake import exchange_records, require_agreement
from lightning_n2uq.distributed.partition import split_units
from lightning_n2uq.distributed.pipeline import Pipeline
from lightning_n2uq.distributed.plan import BucketPlan, Place, whole_span
from lightning_n2uq.distributed.rollcall import RollCall
from lightning_n2uq.distributed.stats import ExchangeStats
from lightning_n2uq.distributed.task import BucketJob, Context, UnitTask
from lightning_n2uq.distributed.topology import Topology

_TELLING_S = 1.0  # a rank that hangs cannot be told; a failing one must not wait for it
_UNITS_PER_BUCKET = 1 << 16  # numbering only: units of different DDP buckets never share a seed


class Engine:
    """Connects the ranks and runs buckets through the exchange. Creating it is a collective call.

    Args:
        config: Settings, equal on all ranks.
        codecs: Codecs of the two phases after warm-up.
        group: Process group whose ranks synchronise; the default group if None.
        device: Of the gradients.
        timeout: Of the exchange's process groups; torch's default if None.
        facts: Further things that have to be equal on all ranks.

    Raises:
        ValueError: On every rank, if two ranks disagree.
    """

    def __init__(
        self,
        config: ExchangeConfig,
        codecs: tuple[Codec, Codec],
        group: dist.ProcessGroup | None,
        device: torch.device,
        timeout: timedelta | None,
        facts: Mapping[str, Any],
    ) -> None:
        self.config, self.codecs, self.device = config, codecs, device
        self._submitted = 0
        self.doing = "start"
        self._roll = RollCall(lambda: Answer(self._submitted, self.doing))
        try:
            self._peers = self._shake_hands(group, facts)
        except BaseException:
            self._roll.close()
            raise
        ranks = dist.get_process_group_ranks(group)
        # Two NCCL communicators at once may deadlock; one thread and one group per set of ranks cannot.
        vary = not all(codec.fixed_size for codec in codecs)
        self.topology = Topology(ranks, config, timeout, shared=device.type == "cuda", vary=vary)
        self.stats = ExchangeStats()
        self.plans: dict[int, BucketPlan] = {}
        self._counted = 0
        parts = 2 if vary else 1
        self._pipeline = Pipeline(parts * self.topology.legs + 1, device, self._explain)
        self._context = Context(
            stats=self.stats,
            seed=self._seed,
            lossy_leg=int(bool(self.topology.node)),
            parts=parts,
            bucket_size=config.bucket_size,
            close_step=self._close_step,
        )

    def _shake_hands(self, group: dist.ProcessGroup | None, facts: Mapping[str, Any]) -> dict[int, str]:
        """Return the other ranks' roll-call addresses, once all ranks agree on everything else."""
        record = self.config.fields() | {
            "version": __version__,
            "codec": self.codecs[0].describe(),
            "second_codec": self.codecs[1].describe(),
            **facts,
        }
        records = exchange_records(record | {"address": self._roll.address}, group, self.device)
        addresses = [str(other.pop("address")) for other in records]
        ranks = dist.get_process_group_ranks(group)
        require_agreement(records, ranks)
        return {rank: place for rank, place in zip(ranks, addresses, strict=True) if rank != dist.get_rank()}

    def prepare(
        self,
        index: int,
        key: tuple[object, ...],
        places: list[Place],
        codecs: tuple[Codec, Codec],
        dtype: torch.dtype,
    ) -> BucketPlan:
        """Make the plan of a bucket: its units, their legs and buffers.

        Args:
            index: Of the DDP bucket.
            key: What the plan is valid for.
            places: Parameters in the buffer.
            codecs: Codecs of the two phases.
            dtype: Of the gradients.
        """
        whole = whole_span(places)
        align = self.config.bucket_size * self.topology.nodes * self.topology.local_size
        units = split_units(whole, self.config.unit_numel, align)
        chains = [
            Chain(
                unit,
                index * _UNITS_PER_BUCKET + number,
                build_legs(unit, self.config, self.topology, codecs, self.device),
                dtype,
                self.device,
            )
            for number, unit in enumerate(units)
        ]
        self.plans[index] = BucketPlan(key, places, chains)
        return self.plans[index]

    def submit(self, plan: BucketPlan, buffer: Tensor, step: int, last: bool) -> torch.futures.Future[Tensor]:
        """Start exchanging a bucket; the future completes with ``buffer``, which then holds the mean."""
        cuda = buffer.device.type == "cuda"
        future: torch.futures.Future[Tensor] = torch.futures.Future(devices=[buffer.device] if cuda else None)
        # DDP ignores exceptions set on a Python future but not those raised by its callbacks.
        result = future.then(lambda done: done.value())
        job = BucketJob(
            future,
            buffer,
            step,
            last,
            torch.cuda.current_stream(buffer.device).record_event() if cuda else None,
        )
        self.stats.begin(buffer.numel())
        self.doing = f"gradient exchange of step {step}"
        for chain in plan.chains:
            self._submitted += 1
            self._pipeline.submit(UnitTask(self._context, job, chain, final=chain is plan.chains[-1]))
        return result

    def _seed(self, step: int, unit: int, leg: int, message: int) -> int:
        number = (unit * self.topology.legs + leg) * (len(self._peers) + 1) + message
        return mix_seed(self.config.seed, dist.get_rank(), step, number)

    def _close_step(self, step: int) -> None:
        sent = sum(wire.sent for wire in self.topology.wires)
        self.stats.close(step, sent - self._counted, len(self._peers) + 1)
        self._counted = sent
        self.doing = f"work after the gradient exchange of step {step}"

    def missing(self, behind: bool = True) -> str:
        """Call the roll; return which ranks failed, are gone or hang, or an empty string.

        Args:
            behind: Whether to mention ranks that answer and are behind this one.
        """
        return "; ".join(self._roll.suspects(self._peers, behind=behind))

    def whereabouts(self) -> str:
        """Return what the other ranks are doing."""
        return self._roll.whereabouts(self._peers)

    def tell(self, text: str, origin: bool) -> None:
        """Tell the other ranks why this one ends, before they see its connections break.

        Args:
            text: What happened, to be read after ``"rank 2 "``.
            origin: Whether the failure began here.
        """
        self._roll.tell(Notice(dist.get_rank(), text, origin), self._peers, grace=_TELLING_S)

    def _explain(self, error: BaseException) -> BaseException:
        doing = self.doing  # before asking, which takes a moment
        who = "; ".join(self._roll.cause(self._peers, error)) or f"all ranks answer ({self.whereabouts()})"
        self.tell(f"stopped in the {doing} because {who}", origin=False)
        return RuntimeError(
            f"gradient exchange failed on rank {dist.get_rank()} in the {doing}: {who} ({error})"
        )

    def close(self) -> None:
        """End the threads."""
        self._pipeline.close()
        self._roll.close()
