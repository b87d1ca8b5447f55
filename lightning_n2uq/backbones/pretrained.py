"""Start a network of the paper from a real-valued one, by name, and say what was and was not taken over."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_n2uq.backbones.mobilenet_v2 import MobileNetV2
from lightning_n2uq.layers import BiasedPReLU
from lightning_n2uq.quantizers import Quantizer

TORCHVISION = "torchvision/"

_FIRST_BOTTLENECK = {"0.0": "conv2", "0.1": "bn2", "1": "conv3", "2": "bn3"}
_BOTTLENECK = {"0.0": "conv1", "0.1": "bn1", "1.0": "conv2", "1.1": "bn2", "2": "conv3", "3": "bn3"}
_CONV_NORM = {"0": "conv1", "1": "bn1"}


@dataclass
class PretrainedReport:
    """Names of the network's entries by what became of them, and of the source's entries left over.

    Attributes:
        source: where the weights came from.
        loaded: taken over.
        added: parameters that no real-valued network has (quantizers, biases and slopes before them).
        missing: not in the source; keep their initial values.
        mismatched: in the source with another shape; keep their initial values.
        unused: in the source only.
    """

    source: str
    loaded: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """Counts, then every name that was not taken over although a real-valued network has it."""
        lines = [
            f"{self.source}: {len(self.loaded)} entries loaded, {len(self.added)} are new in this network"
        ]
        for title, names in (
            ("not in the source, keep their initial values", self.missing),
            ("other shape, keep their initial values", self.mismatched),
            ("in the source only, not used", self.unused),
        ):
            if names:
                lines.append(f"  {title} ({len(names)}): {', '.join(names)}")
        return "\n".join(lines)


@torch.no_grad()
def load_pretrained(
    model: nn.Module, source: str | os.PathLike[str] | Mapping[str, Tensor]
) -> PretrainedReport:
    """Copies every entry of a real-valued network that fits `model`, and reports the rest.

    Understands torchvision's names (ResNets, MobileNetV2) and those of the published N2UQ starting points
    (`module.` in front, shortcuts counted from 1, `feature` for `features`).

    Args:
        model: a network of `lightning_n2uq.backbones`.
        source: `torchvision/<model>` (its default weights, from torch's cache or downloaded), a file with a
            state dict (bare or under `state_dict`, read with `weights_only=True`), or a state dict.

    Raises:
        ValueError: the source cannot be read, or nothing in it fits; `model` is unchanged then.
    """
    label = "state_dict" if isinstance(source, Mapping) else os.fspath(source)
    state = _read(source)
    own = model.state_dict()
    report = PretrainedReport(label)
    fitting: dict[str, Tensor] = {}
    named = {_our_name(key, state, model): key for key in state}
    report.unused = sorted(key for name, key in named.items() if name not in own)
    added = _added(model)
    for name, value in own.items():
        if name not in named:
            (report.added if name in added else report.missing).append(name)
        elif state[named[name]].shape != value.shape:
            report.mismatched.append(f"{name} {tuple(state[named[name]].shape)} -> {tuple(value.shape)}")
        else:
            fitting[name] = state[named[name]]
    if not fitting:
        raise ValueError(f"source: nothing in {label!r} fits {type(model).__name__}")
    report.loaded = list(fitting)
    model.load_state_dict(fitting, strict=False)  # what is left out is in the report
    return report


def _read(source: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, Tensor]:
    content: object = source
    if isinstance(source, str) and source.startswith(TORCHVISION):
        content = _from_torchvision(source.removeprefix(TORCHVISION))
    elif isinstance(source, str | os.PathLike):
        if not Path(source).is_file():
            raise ValueError(f"source: no such file {os.fspath(source)!r}")
        try:
            content = torch.load(source, map_location="cpu", weights_only=True)
        except Exception as error:  # unpickling a damaged file raises almost anything
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"source: cannot read {os.fspath(source)!r} ({reason})") from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not content or not all(map(torch.is_tensor, content.values())):
        raise ValueError("source: no state dict in it, allowed is one, bare or under 'state_dict'")
    return {str(key).removeprefix("module."): value for key, value in content.items()}


def _from_torchvision(name: str) -> Mapping[str, Tensor]:
    from torchvision import models  # only where its weights are asked for

    if name not in models.list_models(models):
        raise ValueError(f"source: torchvision has no classification model {name!r}")
    try:
        state: Mapping[str, Tensor] = models.get_model_weights(name).DEFAULT.get_state_dict(progress=False)
    except OSError as error:  # urllib's errors are OSErrors
        raise ValueError(
            f"source: weights of torchvision's {name!r} are neither in {torch.hub.get_dir()!r} "
            f"nor could be downloaded ({error})"
        ) from error
    return state


def _our_name(key: str, state: Mapping[str, Tensor], model: nn.Module) -> str:
    if isinstance(model, MobileNetV2):
        return _mobilenet_name(key)
    head, _, rest = key.partition(".downsample.")
    weight = state.get(f"{head}.downsample.1.weight")
    if rest and weight is not None and weight.dim() == 4:  # 0 is the place of a quantizer there
        child, _, inside = rest.partition(".")
        return f"{head}.downsample.{int(child) - 1}.{inside}"
    return key


def _mobilenet_name(key: str) -> str:
    key = re.sub(r"^feature\.", "features.", key)
    key = re.sub(r"^classifier\.1\.", "fc.", key)
    if match := re.fullmatch(r"features\.(\d+)\.conv\.(\d(?:\.\d)?)\.(\w+)", key):
        table = _FIRST_BOTTLENECK if match[1] == "1" else _BOTTLENECK
        return f"features.{match[1]}.{table.get(match[2], 'conv.' + match[2])}.{match[3]}"
    if match := re.fullmatch(r"features\.(0|18)\.([01])\.(\w+)", key):
        return f"features.{match[1]}.{_CONV_NORM[match[2]]}.{match[3]}"
    return key


def _added(model: nn.Module) -> set[str]:
    """Entries of modules that a real-valued network does not have."""
    return {
        f"{name}.{entry}"
        for name, module in model.named_modules()
        if isinstance(module, Quantizer | BiasedPReLU)
        for entry in module.state_dict()
    }
