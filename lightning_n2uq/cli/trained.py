"""A trained image classifier from its checkpoint: the module, the names of its classes, its preprocessing."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import LightningModule

from lightning_n2uq.checkpointing.identity import check_training_file
from lightning_n2uq.checkpointing.reading import read_file
from lightning_n2uq.cli.checkpoint_path import checkpoint_file
from lightning_n2uq.convert.record import KEY as QUANTIZATION
from lightning_n2uq.modules.classifier import QuantizedClassifier
from lightning_n2uq.utils.class_names import saved_class_names
from lightning_n2uq.utils.preprocessing import Preprocessing, saved_preprocessing


class Trained(NamedTuple):
    """What a checkpoint of an image classifier holds.

    Attributes:
        module: The module, in evaluation mode on the CPU.
        classes: The names of its classes by number; None where its data had none.
        preprocessing: What was done to image files in evaluation; None where its data were none.
    """

    module: LightningModule
    classes: list[str] | None
    preprocessing: Preprocessing | None


def load_trained(path: str, argument: str = "ckpt_path") -> Trained:
    """Returns the classifier in a checkpoint.

    `QuantizedClassifier` is built from the file alone. Any other module is built from the run's config.yaml
    beside it, which also names its data.

    Raises:
        ValueError: The file cannot be used, or names a module that cannot be built; one line.
    """
    path = checkpoint_file(path, argument)
    checkpoint = read_file(path, argument, mmap=True)
    check_training_file(checkpoint, path, argument, resuming=False)
    classes, steps = saved_class_names(checkpoint), saved_preprocessing(checkpoint, argument)
    if _is_classifier(checkpoint):
        module: LightningModule = QuantizedClassifier.from_checkpoint(path, argument)
        return Trained(module.eval(), classes, steps)
    if not (Path(path).parent / "config.yaml").is_file():
        raise ValueError(
            f"{argument}: {path!r} is no QuantizedClassifier, and the config.yaml that would say what it is "
            "does not lie beside it"
        )
    from lightning_n2uq.cli.building import build, load_weights

    built = build(["--ckpt_path", path])
    built.model.configure_model()
    load_weights(built.model, path, argument)
    return Trained(built.model.eval(), classes, steps or getattr(built.data, "preprocessing", None))


def _is_classifier(checkpoint: Mapping[str, Any]) -> bool:
    known = inspect.signature(QuantizedClassifier).parameters
    arguments = checkpoint.get("hyper_parameters") or {}
    return "backbone" in arguments and QUANTIZATION not in checkpoint and known.keys() >= arguments.keys()
