"""The three collectives of sharded training, as objects to hand to `FSDPModule`.

FSDP2 averages gradients by a reduce-scatter of each module's flat gradient and gathers parameters before
every use. Here both travel as messages of our codecs:

1. Reduce-scatter (`set_custom_reduce_scatter`, torch 2.9): every rank encodes one message per rank about that
   rank's shard, an all-to-all delivers them, each rank decodes and averages in rank order in fp32.
2. All-gather (`set_custom_all_gather`, torch 2.9): every rank encodes its shard of the parameters; all decode
   the same bytes, the owner included. The seed is the step's, so that the backward pass sees the weights of
   the forward pass. The optimizer keeps its parameters in full precision.
3. All-reduce between replicas (`set_all_reduce_hook`, torch 2.8): the exchange of `distributed.exchange` in
   one piece, on the shard that FSDP2 has reduced inside the group of shards.

All calls return when their result is ready; on CUDA that is in the order of the stream that FSDP2 has chosen,
so that it overlaps them with computing as it does with its own.

Markov et al., "Quantized Distributed Training of Large Models with Convergence Guarantees" (QSDP), ICML 2023,
arXiv 2302.02390.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_n2uq.distributed.collectives import all_gather
from lightning_n2uq.distributed.exchange import count_nonfinite
from lightning_n2uq.distributed.phases import AllGatherPhase, Phase, ReduceScatterPhase, build_phases
from lightning_n2uq.distributed.sharded.messages import FlatLayout, stable_number

if TYPE_CHECKING:
    from lightning_n2uq.distributed.sharded.state import ShardedState


class _Comm:
    """What the collectives share.

    Args:
        state: The settings, the step and the counters.
    """

    kind = ""

    def __init__(self, state: ShardedState) -> None:
        self.state = state

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Returns memory for one collective, as FSDP2's own collectives take it."""
        return torch.empty(*size, dtype=dtype, device=device)

    def _run(self, phases: Sequence[Phase], source: Tensor, target: Tensor, layout: FlatLayout) -> None:
        """Sends `source` through the phases into `target`, whose dtype may be any floating one."""
        stats, wide = self.state.stats, source.float()
        result = target if target.dtype == torch.float32 else torch.empty_like(target, dtype=torch.float32)
        for index, phase in enumerate(phases):
            is_last = index == len(phases) - 1
            into = result if is_last else torch.empty(phase.output_numel, device=source.device)
            began = time.perf_counter()
            sent = phase.collectives.sent
            phase.encode(wide, functools.partial(self._seed, layout, index))
            encoded = time.perf_counter()
            work = phase.transmit()
            if work is not None:
                work.wait()  # on CUDA only the stream waits
            arrived = time.perf_counter()
            if index == 0:
                self._measure(phase, wide)
            before = time.perf_counter()
            phase.finish(into)
            wide = into
            if layout.training:
                stats.sending(encoded, arrived)
                stats.add(encode_s=encoded - began, decode_s=time.perf_counter() - before)
                stats.count(self.kind, phase.collectives.sent - sent)
        if result is not target:
            target.copy_(result)

    def _measure(self, phase: Phase, source: Tensor) -> None:
        """Counts the error of what is sent; only gradients have one that users ask for."""

    def _seed(self, layout: FlatLayout, phase: int, message: int) -> int:
        return self.state.seed(stable_number(self.kind, layout.name, phase, message))

    def _count_in_full(self, layout: FlatLayout, sent: float, seconds: float | None = None) -> None:
        """Counts a collective: its bytes in full precision, and its time if it was sent so."""
        if not layout.training:
            return
        self.state.stats.add(full_bytes=sent)
        if seconds is not None:
            now = time.perf_counter()
            self.state.stats.sending(now - seconds, now)
            self.state.stats.count(self.kind, sent)


class _GradientComm(_Comm):
    def _measure(self, phase: Phase, source: Tensor) -> None:
        if self.state.stats.measures(self.state.step):
            error_sq, norm_sq = phase.error(source)
            self.state.stats.add(error_sq=error_sq, norm_sq=norm_sq)

    def _watch(self, gradient: Tensor) -> None:
        if self.state.stats.watch:
            self.state.stats.add(nonfinite=count_nonfinite(gradient, self.state.config.bucket_size))


class CompressedReduceScatter(_GradientComm):
    """Averages gradients into shards by quantized messages; for `FSDPModule.set_custom_reduce_scatter`.

    The mean is unbiased; a NaN or infinity makes the coordinates that share its norm NaN.

    Args:
        state: The settings, the step and the counters.
        compress: False sends in full precision and only counts, for gradients that are compressed elsewhere.
    """

    kind = "reduce-scatter"

    def __init__(self, state: ShardedState, compress: bool = True) -> None:
        super().__init__(state)
        self.compress = compress

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp,
        async_op: bool = False,
    ) -> None:
        """Reduces `input_tensor` `[ranks * n]` to this rank's part `output_tensor` `[n]`.

        Args:
            output_tensor: Overwritten by the mean or the sum.
            input_tensor: The parts of all ranks, one after the other, of any floating dtype.
            group: The ranks of the shards.
            op: `ReduceOp.AVG` or `ReduceOp.SUM`.
            async_op: Has no effect: the result is there when the call returns.

        Raises:
            ValueError: For another `op`.
        """
        with self.state.collective(input_tensor.device):
            layout = self.state.layout(output_tensor.numel())
            self.state.begin_gradient(output_tensor.numel() if self.compress else 0)
            ranks = dist.get_world_size(group)
            full = output_tensor.numel() * output_tensor.element_size() * (ranks - 1)
            if not self.compress:
                began = time.perf_counter()
                reduce_scatter(output_tensor, input_tensor, group, op)
                self._count_in_full(layout, full, time.perf_counter() - began)
                return
            summed = is_sum(op)
            self._count_in_full(layout, full)
            codec = self.state.gradient_codecs()[0]
            phase = ReduceScatterPhase(
                self.state.collectives(group),
                layout.rows(ranks, codec),
                [layout.own(codec)] * ranks,
                input_tensor.device,
            )
            self._run([phase], input_tensor, output_tensor, layout)
            if summed:
                output_tensor.mul_(ranks)
            self._watch(output_tensor)


class CompressedAllGather(_Comm):
    """Gathers parameters in few bits; for `FSDPModule.set_custom_all_gather`.

    Every rank computes with the same weights, whose mean over the steps' random numbers are those of the
    optimizer. Modules in evaluation mode get theirs in full precision. Tensors
    that are not floating-point (of extensions such as float8) travel as they are.

    Args:
        state: The settings, the step and the counters.
    """

    kind = "all-gather"

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        """Gathers the parts `input_tensor` `[n]` of all ranks into `output_tensor` `[ranks * n]`.

        Args:
            output_tensor: Overwritten by all ranks' parts.
            input_tensor: This rank's part; it may lie inside `output_tensor`.
            group: The ranks of the shards.
            async_op: Has no effect: the result is there when the call returns.
        """
        with self.state.collective(input_tensor.device):
            layout = self.state.layout(input_tensor.numel())
            ranks = dist.get_world_size(group)
            codec = self.state.parameter_codec() if layout.training else None
            full = input_tensor.numel() * input_tensor.element_size() * (ranks - 1)
            if codec is None or not input_tensor.is_floating_point():
                began = time.perf_counter()
                all_gather(output_tensor, input_tensor, group, async_op=False)
                self._count_in_full(layout, full, time.perf_counter() - began)
                return
            self._count_in_full(layout, full)
            phase = AllGatherPhase(
                self.state.collectives(group),
                [layout.own(codec)],
                layout.rows(ranks, codec),
                input_tensor.device,
            )
            self._run([phase], input_tensor, output_tensor, layout)


class CompressedAllReduce(_GradientComm):
    """Averages a shard's gradient over the replicas; for `FSDPModule.set_all_reduce_hook`.

    For modules that are sharded over a mesh without the replicas: FSDP2 reduces inside it in full precision,
    and this hook between the replicas. Every replica gets the same bits.

    Args:
        state: The settings, the step and the counters.
        ranks: The global ranks that hold the same shard. Making the object is a collective call of theirs.
    """

    kind = "all-reduce"

    def __init__(self, state: ShardedState, ranks: Sequence[int]) -> None:
        super().__init__(state)
        self._groups = state.replica_groups(ranks)
        self._ranks = len(ranks)

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The process group of the replicas; None where there is one replica."""
        return self._groups.inter_node[0].group if self._groups.inter_node else None

    def __call__(self, reduce_output: Tensor) -> None:
        """Overwrites `reduce_output` `[n]`, of any floating dtype, by its mean over the replicas."""
        if self._ranks == 1:
            return
        state = self.state
        with state.collective(reduce_output.device):
            numel, device = reduce_output.numel(), reduce_output.device
            layout = state.layout(numel)
            state.begin_gradient(numel)
            self._count_in_full(
                layout, 2 * numel * reduce_output.element_size() * (self._ranks - 1) / self._ranks
            )
            phases = build_phases(layout.span, state.config, self._groups, state.gradient_codecs(), device)
            self._run(phases, reduce_output, reduce_output, layout)
            self._watch(reduce_output)


def is_sum(op: Any) -> bool:  # noqa: ANN401 -- torch types its constants as another class
    """Returns whether the ranks' values are added, and not averaged.

    Raises:
        ValueError: For any other operation.
    """
    if op == dist.ReduceOp.SUM:
        return True
    if op == dist.ReduceOp.AVG:
        return False
    raise ValueError(
        f"op: got {op}, allowed are AVG and SUM: call set_force_sum_reduction_for_comms(True) beside "
        "set_gradient_divide_factor"
    )


def reduce_scatter(output: Tensor, values: Tensor, group: dist.ProcessGroup, op: dist.ReduceOp) -> None:
    """Reduces in full precision; torch 2.14 renamed the function and warns at every call of the old name."""
    function = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    function(output, values, op=op, group=group)
