"""LightningModules of a user's own that `QuantizeModel` has quantized: built again from a run's folder."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lightning_n2uq.convert.calibration import taken
from lightning_n2uq.export.program.onnx_program import Inputs
from lightning_n2uq.utils.compat import tree_map

if TYPE_CHECKING:
    from lightning_n2uq.cli.building import Built

_LOADERS = {"test": "test_dataloader", "validate": "val_dataloader", "fit": "train_dataloader"}
"""Stages with their loaders; the first that a data module has is compared on."""


def load_run(path: str) -> tuple[Built, Inputs]:
    """Returns what the run's config.yaml names, with a checkpoint's weights, and an example of its inputs.

    Args:
        path: The checkpoint, with the run's config.yaml beside it.

    Raises:
        ValueError: There is no such config, a class cannot be built, or the module has no
            `example_input_array`; one line.
    """
    from lightning_n2uq.cli.building import build, load_weights  # the command line builds on this package

    if not (Path(path).parent / "config.yaml").is_file():
        raise ValueError(f"ckpt: {path!r} needs the run's config.yaml beside it, which says what it is of")
    built = build(["--ckpt_path", path])
    module = built.model
    module.configure_model()
    load_weights(module, path, "ckpt")
    example: Any = module.example_input_array
    if example is None:
        raise ValueError(
            f"model: got {type(module).__name__} without example_input_array, allowed is one with it: the "
            "module is traced with such an input"
        )
    inputs = Inputs(example) if isinstance(example, tuple) else inputs_of(module, example)
    module.eval()
    return built, _twice(inputs)


def run_batches(built: Built, limit: int | None) -> Iterator[Inputs]:
    """Yields the inputs of test batches, or of validation or training batches where there are no others.

    Args:
        built: What the run's config names.
        limit: Largest number of batches.
    """
    data: Any = built.data
    stage = next((s for s, name in _LOADERS.items() if is_overridden(name, data, LightningDataModule)), None)
    if stage is None:
        raise ValueError(
            f"verify: got {type(data).__name__}, allowed is one with {', '.join(_LOADERS.values())}"
        )
    data.prepare_data()
    data.setup(stage)
    for batch in islice(getattr(data, _LOADERS[stage])(), limit):
        yield inputs_of(built.model, data.on_after_batch_transfer(batch, 0))


def inputs_of(module: LightningModule, batch: Any) -> Inputs:  # noqa: ANN401 -- whatever a loader yields
    """Returns the part of a batch that `forward` takes: names it knows, or as many as it needs."""
    if isinstance(batch, Mapping):
        return Inputs((), taken(module, dict(batch)))
    if isinstance(batch, Tensor):
        return Inputs((batch,))
    parameters = inspect.signature(module.forward).parameters.values()
    needed = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty]
    return Inputs(tuple(batch[: max(len(needed), 1)]))


def _twice(inputs: Inputs) -> Inputs:
    """Returns inputs with a batch of two where it is one, so that the file keeps the size open."""

    def doubled(value: Any) -> Any:  # noqa: ANN401
        one = isinstance(value, Tensor) and value.dim() and len(value) == 1
        return torch.cat([value, value]) if one else value

    return Inputs(tree_map(doubled, inputs.arguments), tree_map(doubled, inputs.keywords))
