"""Finds the weights in a file that someone else's code wrote, and takes wrappers off their names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

KEYS = ("state_dict", "model_state_dict", "model", "net", "network", "weights", "params")
"""Where training scripts put a network's weights, in the order in which they are looked for."""

_COMPILED = "_orig_mod."
_PARALLEL = "module."


def without_wrappers(name: str) -> str:
    """Returns an entry's name without what `torch.compile` and data parallelism put into it."""
    name = name.replace(_COMPILED, "")
    while name.startswith(_PARALLEL):
        name = name.removeprefix(_PARALLEL)
    return name


def named_like(state: Mapping[str, Any], names: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `state` under the names of a module of which either side may have been compiled.

    Args:
        state: The entries of a checkpoint.
        names: The state dict of the module that will load them.
    """
    own = {name.replace(_COMPILED, ""): name for name in names}
    return {own.get(bare := name.replace(_COMPILED, ""), bare): value for name, value in state.items()}


def averaged_keys(content: Mapping[str, Any]) -> list[str]:
    """Returns the keys of a checkpoint that hold averaged weights (`ema` is a part of their names)."""
    return sorted(str(key) for key in content if "ema" in str(key).lower().split("_"))


def find_state_dict(content: object, argument: str) -> dict[str, Tensor]:
    """Returns the weights in `content`, under names without wrappers.

    Args:
        content: A state dict, or what a training script saved around it.
        argument: The user's name for the source, used in errors.

    Raises:
        ValueError: There is no state dict, or several that have none of the usual keys.
    """
    if not isinstance(content, Mapping):
        raise ValueError(f"{argument}: no state dict in it, it holds a {type(content).__name__}")
    state = content if _is_state_dict(content) else _inside(content, argument)
    return {without_wrappers(str(name)): value for name, value in state.items()}


def _inside(content: Mapping[Any, Any], argument: str) -> Mapping[str, Tensor]:
    found = {str(key): value for key, value in content.items() if _is_state_dict(value)}
    for key in KEYS:
        if key in found:
            return found[key]
    if len(found) == 1:
        return next(iter(found.values()))
    allowed = f"allowed is one, bare or under {', '.join(map(repr, KEYS))}"
    there = f"got several, {', '.join(map(repr, found))}" if found else "no state dict in it"
    raise ValueError(f"{argument}: {there}; {allowed}")


def _is_state_dict(value: object) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(map(torch.is_tensor, value.values()))
