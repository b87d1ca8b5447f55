"""Which images are in which split: kept in a checkpoint, compared when it is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor

from lightning_n2uq.datamodules._data.class_folders import count_classes, fingerprint
from lightning_n2uq.datamodules._data.folder_images import FolderImages

KEY = "splits"


def counts_of(dataset: object, classes: int) -> list[int]:
    """Returns the number of images of each class in a split."""
    return count_classes(cast(FolderImages, dataset).labels, classes)


def state_of(dataset: object, classes: int) -> dict[str, Any]:
    """Returns `state_of_files` of a split that is loaded."""
    images = cast(FolderImages, dataset)
    return state_of_files([images.name(index) for index in range(len(images))], images.labels, classes)


def state_of_files(names: list[str], labels: Tensor, classes: int) -> dict[str, Any]:
    """Returns the counts by class and the digest of the files' names."""
    return {"counts": count_classes(labels, classes), "files": fingerprint(names)}


def check_same(saved: Mapping[str, Any], used: Mapping[str, Any], root: str, cut: bool) -> None:
    """Refuses other images than a checkpoint's run had.

    Args:
        saved: `state_of_files` by split, from the checkpoint; empty if it is of a run that did not keep it.
        used: Likewise, of the data at hand.
        root: The data's folder, for the message.
        cut: Whether the data at hand was cut from one folder.

    Raises:
        ValueError: They differ; one line.
    """
    if not saved:
        return
    for split, state in used.items():
        before = saved.get(split)
        if before is None or before["files"] == state["files"]:
            continue
        counts = f"{sum(before['counts'])} then, {sum(state['counts'])} now"
        why = "test images might be ones it was trained on" if cut else "the order would be another one"
        raise ValueError(
            f"root: {root!r} has other images in its {split} split than the network's run ({counts}), so "
            f"that {why}; allowed are the same images{_or_else(cut)}"
        )


def _or_else(cut: bool) -> str:
    return ", val_fraction, test_fraction and split_seed, or a folder with test/<class>/" if cut else ""
