"""Read and write checkpoints of the published N2UQ code.

Such a file is a state dict, bare or under `state_dict`, its keys with or without `module.` in front; other
wrappers (`torch.compile`, `model`) are taken off as well.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_n2uq.interop.names import OfficialName, official_constants, official_names
from lightning_n2uq.utils.atomic import replacing
from lightning_n2uq.utils.state_dicts import find_state_dict

_WRAPPER = "module."


@dataclass(frozen=True)
class ImportReport:
    """What an import took over; anything else would have been an error.

    Attributes:
        source: The file, or `state_dict`.
        loaded: Our names of the entries taken over.
        constants: Published names of the constants, checked and dropped.
        counters: Our names of batch-norm counters that the file lacks and that were set to 0.
    """

    source: str
    loaded: tuple[str, ...]
    constants: tuple[str, ...]
    counters: tuple[str, ...]

    def summary(self) -> str:
        """Returns one line."""
        text = f"{self.source}: {len(self.loaded)} entries loaded, {len(self.constants)} constants checked"
        return text + (f", {len(self.counters)} batch-norm counters set to 0" if self.counters else "")


def read_state_dict(source: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns the state dict in `source`, without wrappers and on the CPU; code in a file is never run.

    Args:
        source: A path, or a mapping: the state dict itself, or one that holds it.

    Raises:
        ValueError: The file is missing or unreadable, or holds no state dict.
    """
    content: object = source
    if isinstance(source, str | os.PathLike):
        if not Path(source).is_file():
            raise ValueError(f"path_or_state_dict: no such file {os.fspath(source)!r}")
        try:
            content = torch.load(source, map_location="cpu", weights_only=True)
        except Exception as error:  # unpickling a damaged file raises almost anything
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise ValueError(f"path_or_state_dict: cannot read {os.fspath(source)!r} ({reason})") from error
    state = find_state_dict(content, "path_or_state_dict")
    for key, value in state.items():
        if value.layout != torch.strided or value.is_meta or value.is_quantized or value.is_complex():
            raise ValueError(
                f"path_or_state_dict: {key} is a tensor of {value.dtype}, {value.layout}, on {value.device}, "
                "allowed are dense tensors of real numbers that have data"
            )
    return state


@torch.no_grad()
def load_official_checkpoint(
    path_or_state_dict: str | os.PathLike[str] | Mapping[str, Any], model: nn.Module
) -> ImportReport:
    """Loads a published N2UQ checkpoint into `model`, wholly or not at all.

    Every entry of the model has to be in the file with its shape, and every entry of the file has to be
    known; constants have to hold the values that the method fixes. Values are cast to the model's dtype.

    Args:
        path_or_state_dict: A file (read with `weights_only=True`) or a mapping.
        model: One of `resnet18`, `resnet34`, `resnet50`, `mobilenet_v2` (or `resnet20`) of
            `lightning_n2uq.backbones` with the checkpoint's bits and `quantize_downsample`.

    Returns:
        What was loaded.

    Raises:
        ValueError: An entry is missing, unknown or misfitting; all are named, the model is unchanged.
    """
    source = read_state_dict(path_or_state_dict)
    names, constants = official_names(model), official_constants(model)
    own = model.state_dict()
    counters = [k for k, o in names.items() if k.endswith("num_batches_tracked") and o.key not in source]
    wanted = {key: official for key, official in names.items() if key not in counters}
    _check_entries(source, own, wanted, constants)
    state = {key: source[official.key].reshape(own[key].shape) for key, official in wanted.items()}
    state.update({key: torch.zeros_like(own[key]) for key in counters})
    model.load_state_dict(state)
    label = "state_dict" if isinstance(path_or_state_dict, Mapping) else os.fspath(path_or_state_dict)
    present = tuple(key for key in constants if key in source)
    return ImportReport(label, tuple(wanted), present, tuple(counters))


def official_state_dict(model: nn.Module, wrapper: bool = False) -> dict[str, Tensor]:
    """Returns the state dict of `model` in the published format, constants included, in the model's dtype.

    Args:
        model: A network as for `load_official_checkpoint`.
        wrapper: Whether `module.` is put in front of every key, as the published training script does.
    """
    own = model.state_dict()
    state: dict[str, Tensor] = {}
    for key, official in official_names(model).items():
        value = own[key].detach().clone()
        state[official.key] = value.view(1, -1, 1, 1) if official.channel_shaped else value
    like = next(model.parameters())
    for key, constant in official_constants(model).items():
        state[key] = torch.tensor([constant], dtype=like.dtype, device=like.device)
    return {(_WRAPPER if wrapper else "") + key: value for key, value in sorted(state.items())}


def save_official_checkpoint(
    model: nn.Module, path: str | os.PathLike[str], wrapper: bool = True, **extra: str | int | float
) -> None:
    """Writes `model` as a published N2UQ checkpoint: `{"state_dict": .., **extra}`.

    Args:
        model: A network as for `load_official_checkpoint`.
        path: The file to write.
        wrapper: Whether `module.` is put in front of every key; the published code expects it.
        extra: Plain values to store beside it, such as `epoch`, which the published code reads on resuming.
    """
    state = {key: value.cpu() for key, value in official_state_dict(model, wrapper).items()}
    with replacing(Path(path)) as partial:
        torch.save({"state_dict": state, **extra}, partial)


def _check_entries(
    source: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    wanted: Mapping[str, OfficialName],
    constants: Mapping[str, float],
) -> None:
    known = {official.key for official in wanted.values()}
    missing = sorted(known - source.keys())
    unknown = sorted(source.keys() - known - constants.keys())
    wrong = [
        f"{official.key} {tuple(source[official.key].shape)} instead of {_shape(own[key], official)}"
        for key, official in wanted.items()
        if official.key in source and tuple(source[official.key].shape) != _shape(own[key], official)
    ]
    for key, value in constants.items():
        if key in source and not torch.equal(source[key].float().cpu().reshape(-1), torch.tensor([value])):
            wrong.append(f"{key} {source[key].flatten().tolist()} instead of [{value:g}]")
    problems = {"missing": missing, "unknown": unknown, "wrong": wrong}
    if any(problems.values()):
        lines = [f"{title} ({len(names)}): {_some(names)}" for title, names in problems.items() if names]
        raise ValueError(
            "path_or_state_dict: does not fit the model (architecture, bits, quantize_downsample?); "
            + "; ".join(lines)
        )


def _shape(value: Tensor, official: OfficialName) -> tuple[int, ...]:
    return (1, value.numel(), 1, 1) if official.channel_shaped else tuple(value.shape)


def _some(names: list[str], limit: int = 20) -> str:
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
