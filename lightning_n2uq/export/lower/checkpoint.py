"""The network in a checkpoint, and what the file says about itself: method, bits, score, versions."""

from __future__ import annotations

import json
from typing import Any

from torch import nn

from lightning_n2uq.checkpointing.identity import VERSION_KEY
from lightning_n2uq.checkpointing.reading import read_file
from lightning_n2uq.convert.record import KEY as QUANTIZATION
from lightning_n2uq.utils.class_names import KEY as CLASS_NAMES
from lightning_n2uq.utils.class_names import saved_class_names
from lightning_n2uq.utils.preprocessing import KEY as PREPROCESSING
from lightning_n2uq.utils.preprocessing import saved_preprocessing
from lightning_n2uq.utils.version import __version__, git_revision


def is_foreign(path: str) -> bool:
    """Returns whether a checkpoint is of a module that `QuantizeModel` has quantized, whatever its class."""
    return QUANTIZATION in read_file(path, "ckpt", mmap=True)


def load_network(path: str) -> tuple[nn.Module, tuple[int, int, int], dict[str, str]]:
    """Returns a checkpoint's network, the shape `(C, H, W)` of its images, and metadata: texts by key.

    Raises:
        ValueError: The file is missing, damaged, not one of ours or of another version; one line.
    """
    from lightning_n2uq.modules.checkpoints import read_checkpoint
    from lightning_n2uq.modules.classifier import QuantizedClassifier

    checkpoint = read_checkpoint(path, "ckpt")
    try:
        model = QuantizedClassifier.from_checkpoint(path, "ckpt")
    except ValueError as error:
        written = checkpoint.get(VERSION_KEY)
        if written is None or written == __version__:
            raise
        raise ValueError(
            f"ckpt: {path!r} was written by version {written}, this is {__version__}, which cannot read it "
            f"({' '.join(str(error).split())[:300]})"
        ) from error
    settings = dict(model.hparams)
    size = int(settings["image_size"])
    shape = (int(settings["in_channels"]), size, size)
    return model.eval(), shape, _metadata(checkpoint, settings)


def run_metadata(checkpoint: object) -> dict[str, str]:
    """Returns what a checkpoint keeps of its data: class names and preprocessing, each as JSON."""
    classes, steps = saved_class_names(checkpoint), saved_preprocessing(checkpoint, "ckpt")
    metadata = {} if not classes else {CLASS_NAMES: json.dumps(classes, ensure_ascii=False)}
    return metadata if steps is None else {**metadata, PREPROCESSING: steps.as_json()}


def _metadata(checkpoint: dict[str, Any], settings: dict[str, Any]) -> dict[str, str]:
    names = ("backbone", "weight_quantizer", "activation_quantizer", "weight_bits", "activation_bits")
    metadata = {name: str(settings[name]) for name in (*names, "num_classes") if name in settings}
    for state in (checkpoint.get("callbacks") or {}).values():
        if isinstance(state, dict) and state.get("best_model_score") is not None:
            metadata["best_score"] = f"{state.get('monitor')}={float(state['best_model_score']):.6g}"
            break
    metadata.update(run_metadata(checkpoint))
    metadata["epoch"] = str(checkpoint.get("epoch", "unknown"))
    return {**metadata, "package": f"lightning_n2uq {__version__}", "git_revision": git_revision()}
