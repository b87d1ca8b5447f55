"""Starts a network of the paper from a real-valued one, by name, and reports what was taken over."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_n2uq.backbones.mobilenet_v2 import MobileNetV2
from lightning_n2uq.layers import BiasedPReLU
from lightning_n2uq.quantizers import Quantizer
from lightning_n2uq.utils.state_dicts import find_state_dict
from lightning_n2uq.utils.torchvision_models import TORCHVISION, default_weights, downloading

_FIRST_BOTTLENECK = {"0.0": "conv2", "0.1": "bn2", "1": "conv3", "2": "bn3"}
_BOTTLENECK = {"0.0": "conv1", "0.1": "bn1", "1.0": "conv2", "1.1": "bn2", "2": "conv3", "3": "bn3"}
_CONV_NORM = {"0": "conv1", "1": "bn1"}


@dataclass
class LoadReport:
    """Names of the network's entries by what became of them, and names that only the source has.

    Attributes:
        source: Where the weights came from.
        loaded: Entries that were copied.
        added: Parameters that no real-valued network has (quantizers, biases and slopes before them).
        missing: Entries that are not in the source and keep their initial values.
        mismatched: Entries that do not fit those of the source and keep their initial values.
        unused: Entries of the source that the network does not have.
    """

    source: str
    loaded: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """Returns counts, then every name that was not copied although the source should have it."""
        total = sum(map(len, (self.loaded, self.added, self.missing, self.mismatched)))
        new = f", {len(self.added)} are new in this network" if self.added else ""
        lines = [f"{self.source}: {len(self.loaded)} of {total} entries loaded{new}"]
        for title, names in (
            ("not in the source, keep their initial values", self.missing),
            ("other shape, keep their initial values", self.mismatched),
            ("in the source only, not used", self.unused),
        ):
            if names:
                lines.append(f"  {title} ({len(names)}): {', '.join(names)}")
        return "\n".join(lines)


def copy_matching(
    model: nn.Module,
    state: Mapping[str, Tensor],
    report: LoadReport,
    argument: str,
    *,
    added: Collection[str] = (),
    refit: Collection[str] = (),
) -> LoadReport:
    """Copies every entry whose name and shape fit `model`, and fills the report, but for `unused`.

    Args:
        model: The network to change.
        state: The source's entries under the network's names.
        report: A report without entries; errors name its source.
        argument: The user's name for the source, used in errors.
        added: Names that are expected to be missing.
        refit: Names that were fitted to another bit width and are not copied.

    Raises:
        ValueError: Nothing fits; `model` is unchanged then.
    """
    for name, value in model.state_dict().items():
        if name not in state:
            (report.added if name in added else report.missing).append(name)
        elif state[name].shape != value.shape:
            report.mismatched.append(f"{name} {tuple(state[name].shape)} -> {tuple(value.shape)}")
        elif name in refit:
            report.mismatched.append(f"{name} (fitted to another bit width)")
        else:
            report.loaded.append(name)
    if not report.loaded:
        raise ValueError(f"{argument}: nothing in {report.source!r} fits {type(model).__name__}")
    model.load_state_dict({name: state[name] for name in report.loaded}, strict=False)  # see the report
    return report


@torch.no_grad()
def load_pretrained(model: nn.Module, source: str | os.PathLike[str] | Mapping[str, Tensor]) -> LoadReport:
    """Copies every entry of a real-valued network that fits `model`, and reports the rest.

    Understands torchvision's names (ResNets, MobileNetV2), those of the published N2UQ starting points
    (shortcuts counted from 1, `feature` for `features`) and the wrappers of `load_entries`.

    Args:
        model: A network of `lightning_n2uq.backbones`, or a converted one.
        source: Where the weights are: `torchvision/<model>` (its default weights, from torch's cache or
            downloaded), a file with a state dict (bare or under a key of `utils.state_dicts.KEYS`, read
            with `weights_only=True`), or a state dict.

    Raises:
        ValueError: The source cannot be read, or nothing in it fits; `model` is unchanged then.
    """
    label = "state_dict" if isinstance(source, Mapping) else os.fspath(source)
    return load_entries(model, find_state_dict(_read(source), "source"), label, "source")


@torch.no_grad()
def load_entries(
    model: nn.Module, state: Mapping[str, Tensor], label: str, argument: str, refit: Collection[str] = ()
) -> LoadReport:
    """Copies what fits `model`, whatever stands in front of the source's names (`backbone.`, `model.`).

    Of all common beginnings that can be taken off the source's names, the one by which most entries fit in
    name and shape is taken off.

    Args:
        model: A network, or a module around one.
        state: The source's entries, without wrappers.
        label: The report's name for the source.
        argument: The user's name for the source, used in errors.
        refit: Names of `model` that were fitted to another bit width and are not copied.

    Raises:
        ValueError: Nothing fits; `model` is unchanged then.
    """
    own = model.state_dict()
    named = _best_names(model, own, state)
    used = {key for name, key in named.items() if name in own}
    report = LoadReport(label, unused=sorted(key for key in state if key not in used))
    renamed = {name: state[key] for name, key in named.items()}
    return copy_matching(model, renamed, report, argument, added=_added(model), refit=refit)


def _best_names(model: nn.Module, own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, str]:
    """Returns the source's names by those of `model`."""
    heads = {name.partition(".")[0] for name in own}
    outer = ["", f"{heads.pop()}."] if len(heads) == 1 else [""]
    best: dict[str, str] = {}
    most = 0
    for before in outer:
        network = model.get_submodule(before[:-1])
        for lead in _leads(state):
            inside = {key.removeprefix(lead): value for key, value in state.items() if key.startswith(lead)}
            named = {before + _our_name(key, inside, network): lead + key for key in inside}
            fits = sum(name in own and own[name].shape == state[key].shape for name, key in named.items())
            if fits > most:
                best, most = named, fits
    return best


def _leads(state: Mapping[str, Tensor], depth: int = 2) -> list[str]:
    """Returns the beginnings of names that may be a wrapper's: none, then those of one and two parts."""
    leads = {"": None}
    for parts in (name.split(".")[:-1] for name in state):
        leads.update({".".join(parts[:n]) + ".": None for n in range(1, min(depth, len(parts)) + 1)})
    return list(leads)


def _read(source: str | os.PathLike[str] | Mapping[str, Any]) -> object:
    if isinstance(source, str) and source.startswith(TORCHVISION):
        with downloading(source, "source"):
            return default_weights(source, "source").get_state_dict(progress=False)
    if not isinstance(source, str | os.PathLike):
        return source
    if not Path(source).is_file():
        raise ValueError(f"source: no such file {os.fspath(source)!r}")
    try:
        return torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling a damaged file raises almost anything
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"source: cannot read {os.fspath(source)!r} ({reason})") from error


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
    """Returns entries of modules that a real-valued network does not have."""
    return {
        f"{name}.{entry}"
        for name, module in model.named_modules()
        if isinstance(module, Quantizer | BiasedPReLU)
        for entry in module.state_dict()
    }
