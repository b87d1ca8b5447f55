"""What the command line takes beside Lightning's own options, and the defaults of every run."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Literal

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser

from lightning_n2uq.callbacks import NonFiniteGuard
from lightning_n2uq.checkpointing import BestAndLastModelCheckpoint
from lightning_n2uq.cli.progress import RunProgressBar
from lightning_n2uq.cli.run_files import ROOT
from lightning_n2uq.utils.validation import check

WANDB_VARIABLE = "WANDB_MODE"
LINKED = ("num_classes", "in_channels", "image_size")
OWN_KEYS = {
    "ckpt_path",
    "weights_only",
    "verbose",
    "return_predictions",
    "test_after_fit",
    "config",
    "resume",
}
"""Options of one sub-command, which the config that a run saves does not hold."""

TRAINER_DEFAULTS: dict[str, Any] = {
    "default_root_dir": ROOT,
    "logger": [
        {"class_path": "WandbLogger", "init_args": {"project": "lightning_n2uq", "offline": True}},
        {"class_path": "CSVLogger", "init_args": {"save_dir": ROOT, "name": "", "version": ""}},
    ],
}
CALLBACK_DEFAULTS: dict[str, Any] = {
    "checkpoint.monitor": "val/acc",
    "checkpoint.mode": "max",
    "checkpoint.filename": "best",
    "checkpoint.save_last": True,
    "checkpoint.auto_insert_metric_name": False,
    "lr_monitor.logging_interval": "epoch",
}


class Link:
    """Reads a model's argument from the data, where the model takes it and the data has it.

    Args:
        name: The argument, and the attribute of the data.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.model: type | None = None
        self.asked: dict[str, Any] = {}

    def __call__(self, data: LightningDataModule | None) -> Any:  # noqa: ANN401
        """Returns the value; the parser drops it for a model without the argument."""
        if hasattr(data, self.name):
            return getattr(data, self.name)
        parameter = None if self.model is None else inspect.signature(self.model).parameters.get(self.name)
        given = self.asked.get(self.name)
        if parameter is not None and parameter.default is parameter.empty and given is None:
            raise ValueError(
                f"data: {type(data).__name__} has no attribute {self.name!r}, which the model is built with"
            )
        return given


def add_options(parser: LightningArgumentParser, command: str, links: Sequence[Link]) -> None:
    """Adds the callbacks that every run has, the links from data to model, and options of our own."""
    parser.add_lightning_class_args(BestAndLastModelCheckpoint, "checkpoint")
    parser.add_lightning_class_args(LearningRateMonitor, "lr_monitor")
    parser.add_lightning_class_args(RunProgressBar, "progress_bar")
    parser.add_lightning_class_args(NonFiniteGuard, "guard")
    parser.set_defaults(CALLBACK_DEFAULTS)
    for link in links:
        parser.link_arguments("data", f"model.init_args.{link.name}", compute_fn=link, apply_on="instantiate")
    parser.add_argument(
        "--non_finite_guard", type=bool, default=True, help="watch for NaN and collapse (see --guard.*)"
    )
    parser.add_argument(
        "--wandb",
        type=Literal["online", "offline", "disabled"] | None,
        default=None,
        help=f"Weights & Biases mode (default: ${WANDB_VARIABLE}, else what the config says)",
    )
    if command == "fit":
        parser.add_argument(
            "--resume",
            type=str | None,
            default=None,
            help="auto: go on from the newest whole checkpoint of this config's runs, in their folder",
        )
        parser.add_argument(
            "--test_after_fit",
            type=bool,
            default=False,
            help="evaluate the best checkpoint on the test split",
        )


def check_linked(model: LightningModule, data: LightningDataModule | None, asked: dict[str, Any]) -> None:
    """Refuses a value that differs from the data's: the parser itself drops it without a word.

    Args:
        model: The model, built with the data's values.
        data: The data module.
        asked: The model's arguments as the user gave them.
    """
    parameters = inspect.signature(type(model)).parameters
    for name in LINKED:
        if name not in parameters or not hasattr(data, name):
            continue
        default = parameters[name].default
        value, used = asked.get(name, default), getattr(data, name)
        check(value in (default, used), f"model.{name}", value, f"is {used!r}, which the data has")
