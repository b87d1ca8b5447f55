"""safetensors files: the description itself, with weights packed in as many bits as they have.

Layout (version 1):
- The header's metadata holds `format` (`lightning_n2uq.deploy`), `version`, `steps` and, with the prefix
  `meta.`, what is known about the network.
- `steps` is a JSON list in execution order. An entry has the step's `op`, `name`, `inputs` and settings
  (infinite numbers as text), and `arrays`: field name to the name of a tensor, `<step name>.<field>`.
- Tensors are stored as they are, except the weights of integer layers: uint8 `[bytes]`, packed as
  `packing.py` says, in C order of `[O, I / groups, kh, kw]`, whose shape is the entry's `weight_shape`. Code
  `q` of `b` bits is the weight `2 q - (2^b - 1)` where `odd` is true, else `q - 2^(b - 1)`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_n2uq.export.ir.description import Description
from lightning_n2uq.export.ir.packing import from_codes, pack, to_codes, unpack
from lightning_n2uq.export.ir.steps import STEPS, IntConv, Step, Window
from lightning_n2uq.utils.atomic import replacing

FORMAT, VERSION = "lightning_n2uq.deploy", "1"
_META = "meta."


def save_safetensors(description: Description, path: str | Path) -> None:
    """Writes the network to a file."""
    from safetensors.numpy import save_file

    tensors: dict[str, NDArray[Any]] = {}
    steps = [_entry(step, tensors) for step in description.steps]
    metadata = {"format": FORMAT, "version": VERSION, "steps": json.dumps(steps)}
    metadata.update({_META + key: text for key, text in description.metadata.items()})
    with replacing(path) as partial:
        save_file(tensors, str(partial), metadata)


def load_safetensors(path: str | Path) -> Description:
    """Reads a network that `save_safetensors` wrote; no code in a file is ever run.

    Raises:
        ValueError: The file is missing, damaged, of another kind or version.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy") as file:
            metadata = file.metadata() or {}
            _check_header(metadata, path)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- not a dict
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())[:300]  # it may quote the file
        raise ValueError(f"path: cannot read {str(path)!r} as safetensors ({reason})") from error
    try:
        steps = tuple(_step(entry, tensors) for entry in json.loads(metadata["steps"]))
        notes = {key.removeprefix(_META): text for key, text in metadata.items() if key.startswith(_META)}
        return Description(steps, notes)
    except (LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"path: {str(path)!r} has a damaged list of steps ({type(error).__name__}: {reason})"
        ) from error


def _check_header(metadata: Mapping[str, str], path: str | Path) -> None:
    if metadata.get("format") != FORMAT:
        raise ValueError(f"path: {str(path)!r} is no network of this package ('format' is not {FORMAT!r})")
    if metadata.get("version") != VERSION:
        got = metadata.get("version")
        raise ValueError(f"path: {str(path)!r} has file version {got!r}, this package reads {VERSION!r}")


def _entry(step: Step, tensors: dict[str, NDArray[Any]]) -> dict[str, Any]:
    arrays = step.arrays()
    entry: dict[str, Any] = {"op": step.op, "arrays": {name: f"{step.name}.{name}" for name in arrays}}
    for name, value in step.settings().items():
        entry[name] = _to_json(value)
    if isinstance(step, IntConv):
        entry["weight_shape"] = list(step.weight.shape)
        arrays["weight"] = pack(to_codes(step.weight, step.bits, step.odd), step.bits)
    tensors.update({entry["arrays"][name]: np.ascontiguousarray(array) for name, array in arrays.items()})
    return entry


def _to_json(value: object) -> object:
    if isinstance(value, Window):
        return asdict(value)
    if isinstance(value, float) and math.isinf(value):
        return str(value)
    return value


def _step(entry: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> Step:
    if entry["op"] not in STEPS:
        raise ValueError(f"path: step {entry['op']!r} is unknown, it was written by another version")
    kind = STEPS[entry["op"]]
    values: dict[str, Any] = {name: tensors[key] for name, key in entry["arrays"].items()}
    for item in fields(kind):
        if item.name not in values and item.name in entry:
            values[item.name] = _from_json(entry[item.name], item.default)
    if issubclass(kind, IntConv):
        values["weight"] = _weight(values, entry["weight_shape"])
    return kind(**values)


def _from_json(value: Any, default: object) -> Any:  # noqa: ANN401 -- one of the kinds `_to_json` wrote
    if isinstance(default, Window):
        return Window(**{key: _from_json(part, None) for key, part in value.items()})
    if isinstance(default, float):
        return float(value)
    return tuple(value) if isinstance(value, list) else value


def _weight(values: Mapping[str, Any], shape: list[int]) -> NDArray[np.int16]:
    bits, odd = values["bits"], values["odd"]
    return from_codes(unpack(values["weight"], bits, math.prod(shape)).reshape(shape), bits, odd)
