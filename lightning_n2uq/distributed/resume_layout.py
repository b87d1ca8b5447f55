"""The first step after a resume, exchanged in the layout of the checkpoint.

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

Future = torch.futures.Future[Tensor]
Submit = Callable[[int, list[Tensor], Tensor, bool], Future]
"""From a bucket's index, parameters and buffer, and whether it is the last, to the future of its mean."""


@dataclass(frozen=True)
class _Held:
    """A bucket of DDP's that waits for the others."""

    buffer: Tensor
    names: tuple[str, ...]
    parameters: Sequence[Tensor]
    gradients: Sequence[Tensor]  # views of the buffer
    future: Future


class Regrouping:
    """Holds one step's buckets until the last and exchanges their gradients in another layout.

    The step does without overlap, and with a second copy of the gradients.
    """

    def __init__(self) -> None:
        self._held: list[_Held] = []

    def hold(
        self, buffer: Tensor, names: Sequence[str], parameters: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> Future:
        """Keep a bucket; the future completes with ``buffer``, which then holds the mean."""
        cuda = buffer.device.type == "cuda"
        future: Future = torch.futures.Future(devices=[buffer.device] if cuda else None)
        self._held.append(_Held(buffer, tuple(names), parameters, gradients, future))
        return future.then(lambda done: done.value())  # DDP ignores exceptions set on a Python future

    def own_layout(self) -> Layout:
        """Return DDP's layout."""
        return tuple(held.names for held in self._held)

    def release(self, layout: Layout, submit: Submit) -> None:
        """Exchange what is held.

        Args:
            layout: The same parameters as in :meth:`own_layout`.
            submit: Starts the exchange of one bucket.
        """
        held, self._held = self._held, []
        parameters = {n: p for bucket in held for n, p in zip(bucket.names, bucket.parameters, strict=True)}
        gradients = {n: g for bucket in held for n, g in zip(bucket.names, bucket.gradients, strict=True)}
        parts = [[gradients[name] for name in names] for names in layout]
        futures = [
            submit(
                index,
                [parameters[name] for name in names],
                torch.cat([gradient.reshape(-1) for gradient in part]),
                index + 1 == len(layout),
            )
            for index, (names, part) in enumerate(zip(layout, parts, strict=True))
        ]

        def write(done: torch.futures.Future[list[Future]]) -> None:
            try:
                for part, future in zip(parts, done.value(), strict=True):
                    pieces = future.value().split([gradient.numel() for gradient in part])
                    for gradient, piece in zip(part, pieces, strict=True):
                        gradient.copy_(piece.view_as(gradient))
            except BaseException as error:  # the training thread waits for these futures
                for bucket in held:
                    bucket.future.set_exception(error)  # type: ignore[arg-type]  # torch's stub is too narrow
                return
            for bucket in held:
                bucket.future.set_result(bucket.buffer)

        torch.futures.collect_all(futures).add_done_callback(write)
