"""Images to verify an export with."""

from __future__ import annotations

import inspect
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_n2uq.export.ir.steps import Normalize
from lightning_n2uq.utils.class_names import KEY

Batch = tuple[NDArray[Any], NDArray[np.int64] | None]

ALLOWED = (
    "digits, random, random:COUNT, a .npz file with 'images' (and 'labels'), a config with a data section, "
    "or run, a .zip or a folder of images where the run's config.yaml lies beside the checkpoint"
)


def verification_batches(
    source: str,
    shape: tuple[int, ...],
    limit: int | None = None,
    batch_size: int = 64,
    root: str | None = None,
    classes: list[str] | None = None,
) -> Iterator[Batch]:
    """Yields batches of float32 images `[N, *shape]` with int64 labels or None.

    Args:
        source: One of `ALLOWED`; data modules give their test split.
        shape: Shape `(C, H, W)` of the network's images.
        limit: Largest number of images to use.
        batch_size: Number of images in a batch.
        root: Folder or .zip that replaces the data module's `root`.
        classes: The names of the network's classes, for data modules that number theirs by name.

    Raises:
        ValueError: The source is unknown or unreadable, or its images have another shape.
    """
    left = np.inf if limit is None else limit
    for images, labels in _source(source, shape, root, classes):
        if images.shape[1:] != shape:
            got = list(images.shape[1:])
            raise ValueError(f"verify: {source!r} has images {got}, allowed is {list(shape)}")
        count = int(min(left, len(images)))
        for start in range(0, count, batch_size):
            part = slice(start, min(start + batch_size, count))
            yield images[part], None if labels is None else labels[part]
        left -= count
        if not left:
            return


def to_pixels(batches: Iterator[Batch], normalize: Normalize) -> Iterator[Batch]:
    """Turns normalized images back into the uint8 pixels that they come from."""
    offset, divisor = (array.reshape(-1, 1, 1) for array in (normalize.offset, normalize.divisor))
    for images, labels in batches:
        yield np.rint(images * divisor + offset).clip(0, 255).astype(np.uint8), labels


def run_data(source: str, root: str | None, checkpoint: str) -> tuple[str, str | None]:
    """Returns `run`, a .zip or a folder as the data of the checkpoint's own config.yaml, with its root.

    Raises:
        ValueError: There is no config.yaml beside the checkpoint, or two roots are given.
    """
    if source != "run" and not source.endswith(".zip") and not Path(source).is_dir():
        return source, root
    config = Path(checkpoint).parent / "config.yaml"
    if not config.is_file():
        raise ValueError(f"verify: {source!r} needs the run's config.yaml beside the checkpoint ({config})")
    if source != "run":
        if root is not None:
            raise ValueError(f"verify_root: got {root!r} beside verify {source!r}, allowed is one of them")
        root = source
    return str(config), root


def _source(
    source: str, shape: tuple[int, ...], root: str | None, classes: list[str] | None
) -> Iterator[Batch]:
    module = source == "digits" or source.endswith((".yaml", ".yml"))
    if root is not None and (not module or source == "digits"):
        raise ValueError(f"verify_root: got {root!r}, allowed with a config only, verify is {source!r}")
    name, _, count = source.partition(":")
    if name == "random" and (not count or count.isdigit()):
        rng = np.random.default_rng(0)
        return iter([(rng.standard_normal((int(count or 64), *shape)).astype(np.float32), None)])
    if source.endswith(".npz"):
        return _archive(source)
    if module:
        return _data_module(source, root, classes)
    raise ValueError(f"verify: got {source!r}, allowed are {ALLOWED}")


def _archive(path: str) -> Iterator[Batch]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            images = archive["images"].astype(np.float32)
            labels = archive["labels"].astype(np.int64) if "labels" in archive else None
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"verify: cannot read {path!r} as a .npz file with 'images' ({reason})") from error
    yield images, labels


def _data_module(source: str, root: str | None, classes: list[str] | None) -> Iterator[Batch]:
    from lightning_n2uq import datamodules

    section: dict[str, Any] = {"class_path": "DigitsDataModule"}
    if source != "digits":
        section = _data_section(source)
    name = str(section.get("class_path", "")).rpartition(".")[2]
    if not hasattr(datamodules, name):
        raise ValueError(f"verify: {source!r} names data module {name!r}, which this package does not have")
    kind = getattr(datamodules, name)
    known = inspect.signature(kind).parameters
    if root is not None and "root" not in known:
        raise ValueError(f"verify_root: got {root!r}, but {name} has no root")
    # On the device, the Trainer would normalize what the loader leaves as bytes; here nobody does.
    changes: dict[str, Any] = {"num_workers": 0, "augment_on_device": False, "root": root}
    changes = {key: value for key, value in changes.items() if key in known and value is not None}
    arguments = section.get("init_args") or {}
    if "classes" in known and arguments.get("classes") is None:
        changes["classes"] = classes
    data = kind(**{**arguments, **changes})
    data.setup("test")
    if classes is not None:
        data.load_state_dict({KEY: classes})
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
