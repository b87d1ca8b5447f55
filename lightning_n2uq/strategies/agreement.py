"""What ranks have to agree on beside the exchange's own settings, compared before the first step.

Ranks that were started with different arguments would train on: with two learning rates, with batches of two
sizes, until one of them has no batch left. The first records are laid down in the store at which the process
group met and not sent through a collective, so that a rank which never comes (it runs another strategy) is
named after a bounded time.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer

from lightning_n2uq.distributed.collectives import require_agreement
from lightning_n2uq.utils.compat import PrefixStore, default_store

LONGEST_WAIT = timedelta(seconds=60)
"""How long the other ranks are waited for, a moment after all of them met in a barrier."""

_HARMLESS = ("root", "num_workers", "pin_memory", "persistent_workers", "prefetch_factor", "memory_format")
_TRAINER = (
    "max_epochs", "min_epochs", "max_steps", "min_steps", "accumulate_grad_batches", "precision",
    "gradient_clip_val", "gradient_clip_algorithm", "limit_train_batches", "limit_val_batches",
    "overfit_batches", "num_sanity_val_steps", "check_val_every_n_epoch", "val_check_interval",
    "reload_dataloaders_every_n_epochs", "fast_dev_run",
)  # fmt: skip
_WATCHERS = ("Monitor", "Bar", "Summary", "Timer", "Checkpoint", "Printer", "Writer", "Guard")
_POLL_S = 0.02
_rounds = itertools.count()


def settings(trainer: Trainer, module: LightningModule, strategy: str) -> dict[str, object]:
    """Returns what was asked for on this rank: strategy, trainer, model, data and callbacks.

    Only plain values are compared, and of a path its last part: a file may lie elsewhere on another machine.
    What decides about speed alone, such as `num_workers`, is left out.
    """
    found: dict[str, object] = {"strategy": strategy, "model": type(module).__name__}
    found |= {f"trainer.{name}": plain(getattr(trainer, name, None)) for name in _TRAINER}
    found |= _arguments("model", module.hparams)
    data = trainer.datamodule  # type: ignore[attr-defined]
    if data is not None:
        public = {name: value for name, value in vars(data).items() if name[0] != "_"}
        found |= {"data": type(data).__name__} | _arguments("data", {**public, **data.hparams})
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        kind = type(callback)
        if kind.__module__.startswith("lightning") and not kind.__name__.endswith(_WATCHERS):
            own = {name: plain(value) for name, value in vars(callback).items() if name[0] != "_"}
            found[f"callbacks.{kind.__name__}"] = own
    return found


def training(trainer: Trainer) -> dict[str, object]:
    """Returns what training on this rank has come to: optimizers, number and size of batches."""
    loader = trainer.train_dataloader
    found: dict[str, object] = {
        "training batches": plain(trainer.num_training_batches),
        "validation batches": plain(trainer.num_val_batches),
        "batch size": plain(getattr(loader, "batch_size", None)),
    }
    for i, optimizer in enumerate(trainer.optimizers):
        found[f"optimizer {i}"] = type(optimizer).__name__
        for j, group in enumerate(optimizer.param_groups):
            values = {name: plain(value) for name, value in group.items() if name != "params"}
            found |= {f"optimizer {i}, group {j}, {name}": value for name, value in values.items()}
    return found


def plain(value: object) -> object:
    """Returns a value as JSON holds it; of anything else its class, of a path its last part."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # NaN is to be equal to itself
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str | os.PathLike):
        return os.path.basename(os.fspath(value).rstrip("/")) if os.path.isabs(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return type(value).__name__


def require_same(facts: Mapping[str, object], wait: timedelta | None) -> None:
    """Compares the facts of all ranks; each of them has to call.

    Args:
        facts: This rank's, as plain values.
        wait: How long to wait for the other ranks.

    Raises:
        ValueError: On every rank, if two ranks disagree, or some did not come.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = PrefixStore(f"agreement/{attempt}/{next(_rounds)}", default_store())
    store.set(str(rank), json.dumps(facts))
    _wait_for_all(store, size, wait)
    records = [json.loads(store.get(str(other))) for other in range(size)]
    require_agreement(records, range(size))


def require_presence(store: Any, rank: int, size: int, wait: timedelta | None) -> None:  # noqa: ANN401
    """Waits until all ranks have come to a store that another strategy connects to, but does not use.

    Args:
        store: The store, connected to by all ranks.
        rank: This rank.
        size: The number of ranks.
        wait: How long to wait for the other ranks.

    Raises:
        ValueError: Some ranks did not come.
    """
    here = PrefixStore("presence", store)
    here.set(str(rank), "")
    _wait_for_all(here, size, wait)


def _wait_for_all(store: Any, size: int, wait: timedelta | None) -> None:  # noqa: ANN401 -- torch's store
    wait = min(wait or LONGEST_WAIT, LONGEST_WAIT)
    until = time.monotonic() + wait.total_seconds()
    while missing := [rank for rank in range(size) if not store.check([str(rank)])]:
        if time.monotonic() > until:
            names = ", ".join(map(str, missing))
            raise ValueError(
                f"strategy: rank {names} did not come to the handshake within {wait.total_seconds():g} s, "
                "allowed is the same strategy on every rank (another one does not shake hands)"
            )
        time.sleep(_POLL_S)


def _arguments(name: str, values: Mapping[str, Any]) -> dict[str, object]:
    kept = {k: v for k, v in values.items() if k not in _HARMLESS and not str(k).startswith("cache")}
    return {f"{name}.{key}": plain(value) for key, value in kept.items() if key != "_instantiator"}
