"""Private names of Lightning, each behind one function here and with one test in `test_compat_lightning.py`.

As in `compat`; nothing here imports Lightning before a function needs it.
"""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any

from lightning_n2uq.utils.compat import private, require

# Lightning: strategies


def init_process_group(environment: Any, backend: str, store: Any, timeout: timedelta | None) -> None:  # noqa: ANN401
    """Joins the default process group through `store`, and leaves it at exit, as Lightning's own do."""
    connect = private("lightning.fabric.utilities.distributed", "_init_dist_connection")
    connect(environment, backend, store=store, timeout=timeout)


def process_group_backend(strategy: Any) -> str:  # noqa: ANN401
    """Returns the backend that a strategy uses: the chosen one, or the one that suits its device."""
    return str(private(strategy, "_get_process_group_backend")())


def synchronizes_batch_norm(strategy: Any) -> bool:  # noqa: ANN401
    """Returns whether the trainer makes batch norm wait for all ranks in every step (`sync_batchnorm`)."""
    return private(strategy, "_layer_sync") is not None


# Lightning: the trainer's loops


def validation_follows(trainer: Any) -> bool:  # noqa: ANN401
    """Returns whether the trainer validates after the batch that it has just trained on."""
    fetcher = private(trainer.fit_loop, "_data_fetcher")
    return bool(private(trainer.fit_loop.epoch_loop, "_should_check_val_fx")(fetcher))


def place_loaders(trainer: Any) -> None:  # noqa: ANN401
    """Tells the loaders of a resumed run where they stopped.

    Lightning forgets it if they were made before the restore, as they are where the module asks for
    `estimated_stepping_batches`.
    """
    loop = trainer.fit_loop
    loader, states = private(loop, "_combined_loader"), private(loop, "_combined_loader_states_to_load")
    if loader is not None and states:
        private(loader, "_load_state_dicts")(states)
        loop._combined_loader_states_to_load = []


def iterate_again(trainer: Any) -> None:  # noqa: ANN401
    """Makes the training loaders' iterators anew, as Lightning does at the start of an epoch.

    Those of a resumed run are made before its random numbers are restored, and draw an order from others.
    """
    fetcher = private(trainer.fit_loop, "_data_fetcher")
    if fetcher is not None:
        iter(fetcher)


def cluster_environment(trainer: Any) -> Any:  # noqa: ANN401
    """Returns what started the processes, also where the strategy is for one device and knows none."""
    return private(trainer, "_accelerator_connector").cluster_environment


def observe_children_with(observe: Callable[[Sequence[Any]], None]) -> None:
    """Makes Lightning's launcher hand the processes that it starts to `observe`, not to its own observer."""
    module = importlib.import_module("lightning.pytorch.strategies.launchers.subprocess_script")
    require(module, "_launch_process_observer")
    module._launch_process_observer = observe  # type: ignore[attr-defined]


def starts_children(trainer: Any) -> bool:  # noqa: ANN401
    """Returns whether the trainer starts the other processes of its machine by running the command again."""
    launcher = private(
        "lightning.pytorch.strategies.launchers.subprocess_script", "_SubprocessScriptLauncher"
    )
    return isinstance(trainer.strategy.launcher, launcher)


def hands_weights_back(trainer: Any) -> bool:  # noqa: ANN401
    """Returns whether ranks are forked or spawned, and the command's own module only gets their weights."""
    launcher = private("lightning.pytorch.strategies.launchers.multiprocessing", "_MultiProcessingLauncher")
    return isinstance(trainer.strategy.launcher, launcher)


def wrap_loading(wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replaces, once, what `load_from_checkpoint` builds and loads an object with by `wrap` of it."""
    saving = importlib.import_module("lightning.pytorch.core.saving")
    load = private(saving, "_load_state")
    if not getattr(load, "converts", False):
        wrapped: Any = wrap(load)
        wrapped.converts = True
        saving._load_state = wrapped  # type: ignore[attr-defined]


def checkpoint_to_come(trainer: Any) -> str | None:  # noqa: ANN401
    """Returns the checkpoint that a run will begin with while it is set up, None without one.

    `trainer.ckpt_path` has it only once it is read; until then it is an argument of the Trainer's `_run`.
    """
    code = private(type(trainer), "_run").__code__
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    path = trainer.ckpt_path if frame is None else frame.f_locals.get("ckpt_path")
    return None if path is None else str(path)


def keep_on_one_line(bar: Any, columns: Iterable[Any]) -> None:  # noqa: ANN401
    """Lets no column of a `RichProgressBar` wrap: in a narrow terminal the bar shrinks, then texts are cut.

    Args:
        bar: The progress bar.
        columns: Its columns but the metrics, which it adds itself.
    """
    from rich.progress import BarColumn
    from rich.table import Column

    for column in (*columns, private(bar, "_metric_component")):
        if not isinstance(column, BarColumn):
            column.get_table_column = lambda: Column(no_wrap=True, overflow="ellipsis")


def without_void_settings(logger: Any) -> None:  # noqa: ANN401
    """Takes from a `WandbLogger` the argument that W&B has removed, and warns of at every start."""
    settings = private(logger, "_wandb_init")
    if settings.get("anonymous") is None:
        settings.pop("anonymous", None)


CHILD_WEIGHTS = ".temp.ckpt"
"""The file in which a process that `ddp_spawn` or `ddp_fork` started hands its weights to the command."""


def renew_last(callback: Any, trainer: Any, after_training: bool) -> None:  # noqa: ANN401
    """Writes a `ModelCheckpoint`'s `last.ckpt` at the end of an epoch, unless it has been at this step.

    Args:
        callback: The `ModelCheckpoint`; one that saves by steps or time is left alone.
        trainer: Its trainer.
        after_training: Whether training has ended the epoch, or its validation.
    """
    if not callback.save_last or private(callback, "_every_n_epochs") < 1:
        return
    if private(callback, "_should_skip_saving_checkpoint")(trainer):
        return
    if private(callback, "_should_save_on_train_epoch_end")(trainer) == after_training:
        candidates = private(callback, "_monitor_candidates")(trainer)
        private(callback, "_save_last_checkpoint")(trainer, candidates)


def last_is_saved(callback: Any, trainer: Any) -> None:  # noqa: ANN401
    """Tells a `ModelCheckpoint` that its `last.ckpt`, from which the run goes on, is of the present step."""
    for name, value in (
        ("_last_global_step_saved", trainer.global_step),
        ("_last_checkpoint_saved", trainer.ckpt_path),
    ):
        private(callback, name)
        setattr(callback, name, value)


def checkpoint_file(path: str) -> str:
    """Returns the file of a checkpoint that holds its plain values: of a folder of shards, one inside."""
    inside = os.path.join(path, private("lightning.fabric.utilities.load", "_METADATA_FILENAME"))
    return inside if os.path.isfile(inside) else path


# Lightning: modules and finders


def attached_trainer(module: Any) -> Any:  # noqa: ANN401
    """Returns the trainer of a LightningModule, None without one, also for modules of other kinds."""
    return vars(module).get("_trainer")


def exits_early(finder: Any) -> bool:  # noqa: ANN401
    """Returns whether a finder of Lightning ends after its search, as a `Tuner` has it."""
    return bool(private(finder, "_early_exit"))
