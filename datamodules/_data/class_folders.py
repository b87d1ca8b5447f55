"""Folders of classes: which of them make which split, what is missing, and a table of the counts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_n2uq.datamodules._data.base import DataNotFoundError, Split
from lightning_n2uq.datamodules._data.image_files import SUFFIXES, ImageSource, below
from lightning_n2uq.utils.validation import check, check_number

SPLITS: tuple[Split, ...] = ("train", "val", "test")
DEFAULT_FRACTION = 0.1
_SPLIT_LIKE = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}
_ROWS = 20  # of classes in the table


@dataclass(frozen=True)
class Layout:
    """Where the splits come from.

    Attributes:
        folder: The folder whose classes are cut into `shared`; empty for the root itself.
        shared: The splits that are cut from one folder; empty where every split has its own.
        fractions: The shares of `val` and of `test` in it.
    """

    folder: str = ""
    shared: tuple[Split, ...] = ()
    fractions: tuple[float, float] = (0.0, 0.0)

    def source_of(self, split: Split, found: Sequence[str]) -> str:
        """Returns the folder of a split's images; without one of its own the test is the validation."""
        if split in self.shared:
            return self.folder
        if split == "test" and "test" not in found:
            return self.folder if "val" in self.shared else "val"
        return split


def find_layout(source: ImageSource, root: str, val: float | None, test: float | None) -> Layout:
    """Returns where the splits come from.

    Args:
        source: The folder or archive.
        root: Its name in errors.
        val: The share of validation images, None for the default.
        test: The share of test images, None for the default.

    Raises:
        ValueError: A share is out of range, or a folder has nearly the name of a split.
        DataNotFoundError: There are no class folders.
    """
    check_number("val_fraction", DEFAULT_FRACTION if val is None else val, 0, 1, above=True, below=True)
    check_number("test_fraction", DEFAULT_FRACTION if test is None else test, 0, 1, below=True)
    shares = tuple(DEFAULT_FRACTION if share is None else share for share in (val, test))
    check(sum(shares) < 1, "val_fraction, test_fraction", shares, "are shares with a sum below 1")
    found = found_splits(source)
    for name in source.folders(""):
        if name not in SPLITS and name.lower() in _SPLIT_LIKE and source.folders(name):
            raise ValueError(
                f"root: got {root!r}, which has a folder {name!r}; splits are called train, val and test"
            )
    if not found:
        return Layout("", _cut(True, shares[1]), (shares[0], shares[1])) if _plain(source, root) else Layout()
    if "train" in found and "val" not in found:
        return Layout("train", _cut("test" not in found, shares[1]), (shares[0], shares[1]))
    return Layout()


def found_splits(source: ImageSource) -> list[Split]:
    """Returns the splits that have class folders of their own."""
    return [split for split in SPLITS if source.folders(split)]


def _cut(with_test: bool, test: float) -> tuple[Split, ...]:
    return ("train", "val", "test") if with_test and test > 0 else ("train", "val")


def _plain(source: ImageSource, root: str) -> bool:
    """Returns whether the root itself has class folders."""
    names = source.folders("")
    if not [name for name in names if name not in SPLITS]:
        raise DataNotFoundError(
            f"root: got {root!r}, which holds no class folders; expected <class>/*.jpg, or train/<class>/, "
            "val/<class>/ and test/<class>/"
        )
    if len(names) == 1:
        inside = source.folders(names[0])
        hint = f"; did you mean {root}/{names[0]}?" if inside else ""
        raise ValueError(
            f"root: got {root!r}, which has one class folder ({names[0]!r}), allowed are two or more{hint}"
        )
    return True


def classes_with_images(
    source: ImageSource, folder: str, splits: Iterable[str]
) -> tuple[list[str], list[str]]:
    """Returns the class folders in `folder`, and those of them that hold no image in any split.

    Args:
        source: The folder or archive.
        folder: The folder that says which classes there are.
        splits: Further folders in which a class may have images.
    """
    names, empty = source.folders(folder), []
    for name in names:
        places = [folder, *(split for split in splits if split != folder)]
        if not any(source.has_images(below(place) + name) for place in places):
            empty.append(name)
    return [name for name in names if name not in empty], empty


def empty_classes(empty: Sequence[str]) -> str:
    """Returns the line that says which class folders are left out."""
    return (
        f"root: {listed(empty)} {'has' if len(empty) == 1 else 'have'} no images and "
        f"{'is' if len(empty) == 1 else 'are'} no class (images are {', '.join(SUFFIXES)})"
    )


def cut_by_class(labels: Tensor, fractions: tuple[float, float], with_test: bool, seed: int) -> list[Tensor]:
    """Cuts the indices of `labels` into training, validation and, `with_test`, test.

    Every class is cut for itself, after a permutation of its own: its share of a part is rounded to the
    nearest whole number, and is at least one image as long as one is left for training.

    Args:
        labels: The class of every image, `[N]` int64.
        fractions: The shares of validation and test.
        with_test: Whether there is a test part.
        seed: The seed of the permutations.

    Returns:
        Sorted, disjoint indices, `[n]` int64 per part.
    """
    shares = fractions if with_test else fractions[:1]
    parts: list[list[Tensor]] = [[] for _ in range(1 + len(shares))]
    generator = torch.Generator().manual_seed(seed)
    for label in labels.unique().tolist():
        members = (labels == label).nonzero()[:, 0]
        members = members[torch.randperm(len(members), generator=generator)]
        left = len(members)
        for part, share in zip(parts[1:], shares, strict=True):
            count = min(max(1, round(share * len(members))), left - 1)
            part.append(members[left - count : left])
            left -= count
        parts[0].append(members[:left])
    return [torch.cat(part).sort().values for part in parts]


def fingerprint(names: Sequence[str]) -> str:
    """Returns a digest of a split's files by name, in order."""
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:32]


def count_classes(labels: Tensor, classes: int) -> list[int]:
    """Returns the number of images of each class."""
    return labels.bincount(minlength=classes).tolist()


def missing_classes(split: str, counts: Sequence[int], classes: Sequence[str]) -> str | None:
    """Returns the line that names classes without an image in a split, or None."""
    missing = [name for name, count in zip(classes, counts, strict=True) if not count]
    return f"root: the {split} split has no images of {listed(missing)}" if missing else None


def listed(names: Sequence[str], most: int = 5) -> str:
    """Returns the first names, and how many more there are."""
    shown = ", ".join(repr(name) for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def table(classes: Sequence[str], counts: Mapping[str, Sequence[int]]) -> str:
    """Returns the counts as text: a line per class and the sums; of many classes the first ones."""
    shown = list(range(len(classes) if len(classes) <= _ROWS else _ROWS - 1))
    rows = [["class", *counts]]
    rows += [[classes[number], *(str(part[number]) for part in counts.values())] for number in shown]
    if len(shown) < len(classes):
        rest = [part[len(shown) :] for part in counts.values()]
        ranges = [f"{min(part)}..{max(part)}" for part in rest]
        rows.append([f"({len(classes) - len(shown)} more)", *ranges])
    rows.append(["all", *(str(sum(part)) for part in counts.values())])
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return "\n".join(f"  {row[0]:<{widths[0]}}" + _numbers(row[1:], widths[1:]) for row in rows)


def _numbers(row: Sequence[str], widths: Sequence[int]) -> str:
    return "".join(f"  {text:>{width}}" for text, width in zip(row, widths, strict=True))
