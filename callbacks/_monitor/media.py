"""What only some loggers can take: W&B's step axis, histograms and tables, and images."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_n2uq.callbacks._common.log_sink import last_step
from lightning_n2uq.report.layer_record import LayerRecord
from lightning_n2uq.utils.class_names import KEY, trainers_class_names
from lightning_n2uq.utils.version import UNKNOWN, __version__, git_revision

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

STEP = "trainer/global_step"
"""The step axis of every family, written by Lightning's W&B logger."""

FAMILIES = ("train/*", "val/*", "test/*", "quant/*", "entropy/*", "comm/*", "speed/*")
_BEST = {"val/acc": "max", "val/loss": "min"}


def wandb_loggers(trainer: Trainer) -> list[WandbLogger]:
    """Returns the W&B loggers of the run, on rank 0; none elsewhere."""
    return [x for x in trainer.loggers if isinstance(x, WandbLogger)] if trainer.is_global_zero else []


def takes_images(trainer: Trainer) -> bool:
    """Returns whether this rank has a logger that can show images, and matplotlib to draw them."""
    kinds = (WandbLogger, TensorBoardLogger)
    if not trainer.is_global_zero or not any(isinstance(logger, kinds) for logger in trainer.loggers):
        return False
    if importlib.util.find_spec("matplotlib") is None:
        rank_zero_warn(
            "QuantizationMonitor draws no figures: matplotlib is not installed (pip install matplotlib)"
        )
        return False
    return True


def define_run(trainer: Trainer) -> None:
    """Gives every family W&B's step axis and says which code runs."""
    for logger in wandb_loggers(trainer):
        run = logger.experiment
        run.define_metric(STEP)
        for family in FAMILIES:
            run.define_metric(family, step_metric=STEP)
        for name, best in _BEST.items():
            run.define_metric(name, step_metric=STEP, summary=best)
        names = trainers_class_names(trainer)
        known = {"code": code_version()} if names is None else {"code": code_version(), KEY: names}
        run.config.update(known, allow_val_change=True)


def code_version() -> dict[str, str]:
    """Returns versions of this package, torch and Python, and the commit of a package in a git checkout."""
    versions = {
        "lightning_n2uq": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    revision = git_revision()
    return versions if revision == UNKNOWN else {**versions, "commit": revision}


def log_histograms(trainer: Trainer, records: Iterable[LayerRecord]) -> None:
    """Sends histograms of the layers' inputs to W&B."""
    loggers = wandb_loggers(trainer)
    if not loggers:
        return
    import numpy as np
    import wandb

    histograms: dict[str, Any] = {}
    for record in records:
        if record.activation is not None:
            part = record.activation
            edges = np.linspace(part.low, part.high, len(part.histogram) + 1)
            histograms[f"quant/{record.name}/inputs"] = wandb.Histogram(
                np_histogram=(np.asarray(part.histogram), edges)
            )
    for logger in loggers:
        logger.experiment.log({**histograms, STEP: last_step(trainer)})


def log_table(trainer: Trainer, records: Sequence[LayerRecord]) -> None:
    """Sends a table of layers with all scalars to W&B."""
    rows = [record.scalars() for record in records]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for logger in wandb_loggers(trainer):
        data = [
            [record.name, *(row.get(key) for key in columns)]
            for record, row in zip(records, rows, strict=True)
        ]
        logger.log_table("quant/layers", columns=["layer", *columns], data=data, step=last_step(trainer))


def log_figure(trainer: Trainer, name: str, figure: Figure) -> None:
    """Sends a figure to every logger that can show one, from rank 0."""
    if not takes_images(trainer):
        return
    pixels = rasterize(figure)
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(name, [pixels], step=last_step(trainer))
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, pixels, last_step(trainer), dataformats="HWC")


def rasterize(figure: Figure) -> np.ndarray:
    """Returns the pixels `[height, width, 3]` uint8 of a figure."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
