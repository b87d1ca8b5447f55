"""LightningModules of a user's own that `QuantizeModel` has quantized: built again from a run's folder."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from lightning_n2uq.checkpointing.reading import read_file
from lightning_n2uq.convert.record import KEY, Record, restore
from lightning_n2uq.export.program.onnx_program import Inputs
from lightning_n2uq.utils.compat import tree_map


def load_module(path: str) -> tuple[Any, Inputs]:
    """Returns the LightningModule of a checkpoint, in evaluation mode, and an example of its inputs.

    The run's config.yaml beside the checkpoint says which class it is and what it is built with.

    Raises:
        ValueError: There is no such config, the class cannot be built, or it has no `example_input_array`.
    """
    checkpoint = read_file(path, "ckpt", mmap=True)
    module = _built(_config_of(path), "model")
    module.configure_model()
    restore(module, Record.from_mapping(checkpoint[KEY], "ckpt"), "ckpt")
    module.load_state_dict(checkpoint["state_dict"])
    example = getattr(module, "example_input_array", None)
    if example is None:
        raise ValueError(
            f"model: got {type(module).__name__} without example_input_array, allowed is one with it: the "
            "module is traced with such an input"
        )
    return module.eval(), _twice(_inputs(module, example))


def run_batches(path: str, module: nn.Module, limit: int | None) -> Iterator[Inputs]:
    """Yields the inputs of the run's own test batches, or of validation batches where there are no others.

    Args:
        path: The checkpoint, with the run's config.yaml beside it.
        module: Its module.
        limit: Largest number of batches.
    """
    data = _built(_config_of(path), "data")
    data.prepare_data()
    loader: Any = None
    for stage, name in (
        ("test", "test_dataloader"),
        ("validate", "val_dataloader"),
        ("fit", "train_dataloader"),
    ):
        if _overridden(data, name):
            data.setup(stage)
            loader = getattr(data, name)()
            break
    if loader is None:
        raise ValueError(
            f"verify: {type(data).__name__} has no loader of test, validation or training batches"
        )
    for batch in islice(loader, limit):
        yield _inputs(module, batch)


def _overridden(data: object, name: str) -> bool:
    from lightning.pytorch import LightningDataModule

    return getattr(type(data), name, None) is not getattr(LightningDataModule, name)


def _config_of(path: str) -> dict[str, Any]:
    file = Path(path).parent / "config.yaml"
    if not file.is_file():
        raise ValueError(f"ckpt: {path!r} needs the run's config.yaml beside it, which says what it is of")
    config = yaml.safe_load(file.read_text(encoding="utf-8"))
    return dict(config) if isinstance(config, Mapping) else {}


def _built(config: Mapping[str, Any], section: str) -> Any:  # noqa: ANN401 -- of any class
    from lightning_n2uq.cli.own_code import check_importable, class_of, see_current_folder

    values = config.get(section)
    if not isinstance(values, Mapping) or "class_path" not in values:
        raise ValueError(
            f"{section}: got {values!r} in the run's config.yaml, allowed is one with class_path"
        )
    see_current_folder()
    check_importable([], [f"--{section}={values['class_path']}"])
    kind, given = class_of(str(values["class_path"])), dict(values.get("init_args") or {})
    try:
        return kind(**given)
    except Exception as error:  # a user's own code may raise anything
        reason = " ".join(str(error).split())
        raise ValueError(f"{section}: {kind.__name__} cannot be built from the config ({reason})") from error


def _inputs(module: nn.Module, batch: Any) -> Inputs:  # noqa: ANN401 -- whatever a loader yields
    """Returns the part of a batch that `forward` takes: names it knows, or as many as it needs."""
    taken = [
        p for p in inspect.signature(module.forward).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    if isinstance(batch, Mapping):
        names = {p.name for p in taken}
        return Inputs((), {key: value for key, value in batch.items() if key in names})
    if isinstance(batch, Tensor):
        return Inputs((batch,))
    needed = max(sum(p.default is p.empty for p in taken), 1)
    return Inputs(tuple(batch[:needed]))


def _twice(inputs: Inputs) -> Inputs:
    """Returns inputs with a batch of two where it is one, so that the file keeps the size open."""

    def doubled(value: Any) -> Any:  # noqa: ANN401
        one = isinstance(value, Tensor) and value.dim() and len(value) == 1
        return torch.cat([value, value]) if one else value

    return Inputs(tree_map(doubled, inputs.arguments), tree_map(doubled, inputs.keywords))
