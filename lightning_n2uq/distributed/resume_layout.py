"""The first step after a resume, exchanged in the buckets' layout of the checkpoint.

DDP lays out its buckets by the order of the parameters at first, and after one step by the order in which
gradients were ready. Norms, random numbers and residuals go with places in buckets, so a resumed run whose
first step used the first layout would leave the path of the run it continues.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_n2uq.distributed.residuals import Layout
from lightning_n2uq.utils.compat import GradBucket

Future = torch.futures.Future[Tensor]
Start = Callable[[int, Sequence[Tensor], Tensor, bool], Future]
"""From a bucket's index, parameters and buffer, and whether it is the last, to the future of its mean."""


@dataclass(frozen=True)
class _Held:
    """A bucket of DDP's that waits for the others."""

    names: tuple[str, ...]
    buffer: Tensor
    parameters: Sequence[Tensor]
    gradients: Sequence[Tensor]  # views of the buffer
    future: Future


class ResumeLayout:
    """Holds one step's buckets until the last and exchanges their gradients in another layout.

    The step does without overlap, and with a second copy of the gradients.
    """

    def __init__(self) -> None:
        self._held: list[_Held] = []

    def hold(self, bucket: GradBucket, names: Sequence[str]) -> Future:
        """Keeps a bucket; the future completes with its buffer, which then holds the mean."""
        buffer, parameters, gradients = bucket.buffer(), bucket.parameters(), bucket.gradients()
        future: Future = torch.futures.Future(devices=[buffer.device] if buffer.is_cuda else None)
        self._held.append(_Held(tuple(names), buffer, parameters, gradients, future))
        return future.then(lambda done: done.value())  # DDP ignores exceptions set on a Python future

    def own_layout(self) -> Layout:
        """Returns DDP's layout."""
        return tuple(held.names for held in self._held)

    def release(self, layout: Layout, start: Start) -> None:
        """Exchanges what is held.

        Args:
            layout: The same parameters as in `own_layout`.
            start: Starts the exchange of one bucket.
        """
        parameters: dict[str, Tensor] = {}
        gradients: dict[str, Tensor] = {}
        for held in self._held:
            parameters.update(zip(held.names, held.parameters, strict=True))
            gradients.update(zip(held.names, held.gradients, strict=True))
        parts = [[gradients[name] for name in names] for names in layout]
        futures = [
            start(
                index,
                [parameters[name] for name in names],
                torch.cat([gradient.reshape(-1) for gradient in part]),
                index + 1 == len(layout),
            )
            for index, (names, part) in enumerate(zip(layout, parts, strict=True))
        ]
        torch.futures.collect_all(futures).add_done_callback(lambda done: self._write(done, parts))

    def _write(self, done: torch.futures.Future[list[Future]], parts: Sequence[Sequence[Tensor]]) -> None:
        """Puts the means back into DDP's buckets."""
        try:
            for part, future in zip(parts, done.value(), strict=True):
                pieces = future.value().split([gradient.numel() for gradient in part])
                for gradient, piece in zip(part, pieces, strict=True):
                    gradient.copy_(piece.view_as(gradient))
        except BaseException as error:  # the training thread waits for these futures
            for held in self._held:
                held.future.set_exception(error)  # type: ignore[arg-type]  # torch's stub is too narrow
            return
        for held in self._held:
            held.future.set_result(held.buffer)
