"""Training batches a second time, without a trace in the loader that training reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from lightning.pytorch.utilities import CombinedLoader
from lightning_utilities.core.apply_func import apply_to_collection
from torch.utils.data import DataLoader, IterableDataset

from lightning_n2uq.utils.validation import check


def batches_again(loaders: Any, count: int) -> Iterator[Any]:  # noqa: ANN401
    """Yields the first batches of an epoch from loaders of their own, with the samplers of the given ones.

    The generators of loaders and samplers are as before afterwards; the global ones are the caller's to keep.

    Args:
        loaders: What `trainer.train_dataloader` is: a loader, or a collection of them.
        count: The number of batches at most.

    Raises:
        ValueError: There is an iterator among them, which yields its batches once.
    """
    generators = _generators(loaders)
    states = [generator.get_state() for generator in generators]
    try:
        twins = apply_to_collection(loaders, DataLoader, _twin)
        check(iter(twins) is not twins, "train_dataloader", "an iterator", "is what can be read again")
        if isinstance(twins, DataLoader) or not isinstance(twins, list | tuple | dict):
            yield from _first(twins, count)
        else:
            combined = CombinedLoader(twins, "max_size_cycle")
            for batch, _, _ in _first(combined, count):
                yield batch
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _first(batches: Iterable[Any], count: int) -> Iterator[Any]:
    for _, batch in zip(range(count), batches, strict=False):
        yield batch


def _twin(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Returns a loader of the same batches with workers of its own, gone with its iterator."""
    kept = ("num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "generator")
    options: dict[str, Any] = {name: getattr(loader, name) for name in kept}
    if loader.num_workers:
        options["multiprocessing_context"] = loader.multiprocessing_context
    if loader.batch_sampler is not None and not isinstance(loader.dataset, IterableDataset):
        return DataLoader(loader.dataset, batch_sampler=loader.batch_sampler, **options)
    options["batch_size"] = loader.batch_size  # None: samples come as they are
    if isinstance(loader.dataset, IterableDataset):
        return DataLoader(loader.dataset, drop_last=loader.drop_last, **options)
    return DataLoader(loader.dataset, sampler=loader.sampler, **options)


def _generators(loaders: Any) -> list[torch.Generator]:  # noqa: ANN401
    """Returns the generators of their own that loaders and samplers draw from, each once."""
    found: dict[int, torch.Generator] = {}

    def look(loader: DataLoader[Any]) -> None:
        batch_sampler = loader.batch_sampler
        for owner in (loader, loader.sampler, batch_sampler, getattr(batch_sampler, "sampler", None)):
            generator = getattr(owner, "generator", None)
            if isinstance(generator, torch.Generator):
                found[id(generator)] = generator

    apply_to_collection(loaders, DataLoader, look)
    return list(found.values())
