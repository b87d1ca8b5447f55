"""Settings that differ between a run and the command that would go on with it: honoured, warned of, refused.

A checkpoint brings its own optimizer, schedule and order of data. A changed learning rate has then no effect,
a changed batch size drops images of the epoch that was interrupted, a changed split moves images between
training and validation: whoever changes them wants another run. What a resumed run does follow (how long it
trains, where and how it is watched) may be changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from lightning_n2uq.utils.nested import flatten

HONOURED = (
    "trainer.max_epochs", "trainer.min_epochs", "trainer.max_steps", "trainer.min_steps", "trainer.max_time",
    "trainer.logger*", "trainer.profiler*", "trainer.plugins*", "trainer.enable_*",
    "trainer.log_every_n_steps", "trainer.default_root_dir", "trainer.detect_anomaly", "trainer.benchmark",
    "trainer.limit_val_batches", "trainer.limit_test_batches", "trainer.limit_predict_batches",
    "trainer.num_sanity_val_steps", "trainer.check_val_every_n_epoch", "trainer.val_check_interval",
    "trainer.fast_dev_run", "trainer.inference_mode", "trainer.barebones", "trainer.accelerator",
    "checkpoint*", "lr_monitor*", "progress_bar*", "guard*", "non_finite_guard", "wandb",
    "data.init_args.num_workers", "data.init_args.pin_memory", "data.init_args.cache*",
)  # fmt: skip
"""Take effect from the checkpoint on."""

RANKS = ("trainer.devices", "trainer.num_nodes")
"""Take effect, but the run ends elsewhere than an uninterrupted one: a cluster may have fewer ranks today."""

METHOD = (
    "trainer.strategy*", "trainer.precision", "trainer.deterministic", "trainer.gradient_clip_*",
    "trainer.sync_batchnorm", "trainer.callbacks*", "data.init_args.root",
)  # fmt: skip
"""Take effect likewise, but make another experiment: followed only where a checkpoint is named."""

ONCE_WRITTEN = {"trainer.strategy.init_args.levels": "exponential"}
"""What configs of earlier releases hold where a default is left open now."""

WATCHERS = (
    "QuantizationMonitor", "CommunicationMonitor", "LearningRateMonitor", "DeviceStatsMonitor",
    "ModelSummary", "RichModelSummary", "Timer", "TQDMProgressBar", "RichProgressBar", "EarlyStopping",
    "ModelCheckpoint", "BestAndLastModelCheckpoint", "TorchCompile",
)  # fmt: skip
"""Callbacks that change no weight."""


class Change(NamedTuple):
    """One setting: its dotted key, and its value in the run and in the command."""

    key: str
    before: object
    after: object

    def __str__(self) -> str:
        return f"{self.key} {self.before!r}, got {self.after!r}"


class Changes(NamedTuple):
    """The settings that differ, by what becomes of them; honoured ones are left out.

    Attributes:
        refused: A resumed run would not follow these.
        method: Followed, but another experiment.
        ranks: Followed, at the cost of the exact end.
    """

    refused: list[Change]
    method: list[Change]
    ranks: list[Change]


def compare(saved: Mapping[str, Any], given: Mapping[str, Any]) -> Changes:
    """Compares the config that a run has saved with that of a command.

    An argument of a model, a data module or a strategy that only one of them has is of another release and
    not compared; without a saved config nothing is.
    """
    if not saved:
        return Changes([], [], [])
    before, after = (flatten(_without_watchers(config)) for config in (saved, given))
    changes = [
        Change(key, before.get(key), after.get(key))
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not _of_another_release(key, before, after)
    ]
    parts = [[c for c in changes if _matches(c.key, patterns)] for patterns in (METHOD, RANKS)]
    return Changes([c for c in changes if not _matches(c.key, HONOURED + METHOD + RANKS)], *parts)


def _without_watchers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config with those callbacks only that may change a weight."""
    trainer = dict(config.get("trainer") or {})
    callbacks = trainer.pop("callbacks", None) or []
    listed = callbacks if isinstance(callbacks, list) else [callbacks]
    trainer["callbacks"] = [c for c in listed if _class_name(c) not in WATCHERS]
    return {**config, "trainer": trainer}


def _class_name(callback: object) -> str:
    path = callback.get("class_path", "") if isinstance(callback, Mapping) else callback
    return str(path).rpartition(".")[2]


def _of_another_release(key: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    if key in ONCE_WRITTEN and {before.get(key), after.get(key)} == {None, ONCE_WRITTEN[key]}:
        return True
    of_class = key.count(".") == 2 + key.startswith("trainer.strategy.") and ".init_args." in key
    return of_class and not (key in before and key in after)


def _matches(key: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)
