"""What a checkpoint says about itself, and the network in it."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from torch import nn

from lightning_n2uq._version import __version__

VERSION_KEY = "lightning_n2uq_version"


def load_network(path: str) -> tuple[nn.Module, tuple[int, int, int], dict[str, str]]:
    """The trained network of a checkpoint, the shape `(C, H, W)` of its images, and the file's metadata.

    Raises:
        ValueError: the file is missing, damaged, not one of ours or of another version; one line.
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
    return model.eval(), shape, checkpoint_metadata(checkpoint, settings)


def checkpoint_metadata(checkpoint: dict[str, Any], settings: dict[str, Any]) -> dict[str, str]:
    """Method, bits, score, versions: texts by key."""
    names = ("backbone", "weight_quantizer", "activation_quantizer", "weight_bits", "activation_bits")
    metadata = {name: str(settings[name]) for name in (*names, "num_classes") if name in settings}
    score = _best_score(checkpoint)
    if score:
        metadata["best_score"] = score
    metadata["epoch"] = str(checkpoint.get("epoch", "unknown"))
    return {**metadata, **package_metadata()}


def package_metadata() -> dict[str, str]:
    """Version of the package and, in a git checkout, its revision."""
    return {"package": f"lightning_n2uq {__version__}", "git_revision": git_revision()}


def _best_score(checkpoint: dict[str, Any]) -> str | None:
    """`monitor=value` of the callback that kept the best checkpoint."""
    for state in (checkpoint.get("callbacks") or {}).values():
        if isinstance(state, dict) and state.get("best_model_score") is not None:
            return f"{state.get('monitor')}={float(state['best_model_score']):.6g}"
    return None


def git_revision() -> str:
    """Commit that the package's own files come from, or `unknown` outside of a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return answer.stdout.strip() or "unknown"
