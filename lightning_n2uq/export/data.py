"""Images to verify an export with."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Batch = tuple[NDArray[Any], NDArray[np.int64] | None]

ALLOWED = (
    "digits, random, random:COUNT, a .npz file with 'images' (and 'labels'), or a config with a data section"
)


def verification_batches(
    source: str, shape: tuple[int, ...], limit: int | None = None, batch_size: int = 64
) -> Iterator[Batch]:
    """Batches of float32 images `[N, *shape]` with int64 labels or None.

    Args:
        source: see `ALLOWED`; data modules give their test split.
        shape: of the network's images.
        limit: use at most so many images.
        batch_size: images at a time.

    Raises:
        ValueError: the source is unknown or unreadable, or its images have another shape.
    """
    left = np.inf if limit is None else limit
    for images, labels in _rebatch(_source(source, shape), batch_size):
        if images.shape[1:] != shape:
            got = list(images.shape[1:])
            raise ValueError(f"verify: {source!r} has images {got}, allowed is {list(shape)}")
        if left <= 0:
            return
        count = int(min(left, len(images)))
        left -= count
        yield images[:count], None if labels is None else labels[:count]


def _source(source: str, shape: tuple[int, ...]) -> Iterator[Batch]:
    name, _, count = source.partition(":")
    if name == "random" and (not count or count.isdigit()):
        rng = np.random.default_rng(0)
        return iter([(rng.standard_normal((int(count or 64), *shape)).astype(np.float32), None)])
    if source.endswith(".npz"):
        return _archive(source)
    if source == "digits" or source.endswith((".yaml", ".yml")):
        return _data_module(source)
    raise ValueError(f"verify: got {source!r}, allowed are {ALLOWED}")


def _archive(path: str) -> Iterator[Batch]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            images = archive["images"].astype(np.float32)
            labels = archive["labels"].astype(np.int64) if "labels" in archive else None
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"verify: cannot read {path!r} as a .npz file with 'images' ({error})") from error
    yield images, labels


def _data_module(source: str) -> Iterator[Batch]:
    from lightning_n2uq import datamodules

    section: dict[str, Any] = {"class_path": "DigitsDataModule"}
    if source != "digits":
        section = _data_section(source)
    name = str(section.get("class_path", "")).rpartition(".")[2]
    if not hasattr(datamodules, name):
        raise ValueError(f"verify: {source!r} names data module {name!r}, which this package does not have")
    data = getattr(datamodules, name)(**{**section.get("init_args", {}), "num_workers": 0})
    data.setup("test")
    for images, labels, *_ in data.test_dataloader():
        yield np.ascontiguousarray(images.numpy()), labels.numpy()


def _data_section(source: str) -> dict[str, Any]:
    import yaml

    from lightning_n2uq.cli.configs import find_config

    config = yaml.safe_load(Path(find_config(source)).read_text(encoding="utf-8"))
    section = config.get("data") if isinstance(config, dict) else None
    if not isinstance(section, dict):
        raise ValueError(f"verify: {source!r} has no data section")
    return section


def _rebatch(batches: Iterator[Batch], size: int) -> Iterator[Batch]:
    for images, labels in batches:
        for start in range(0, len(images), size):
            part = slice(start, start + size)
            yield images[part], None if labels is None else labels[part]
