"""Images to predict: a file, everything below a folder, or a .zip; broken ones are named, none is lost."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_n2uq.datamodules._data.base import existing_path
from lightning_n2uq.datamodules._data.decode import BrokenImageError, decode
from lightning_n2uq.datamodules._data.folder_images import eval_transform
from lightning_n2uq.datamodules._data.image_files import SUFFIXES, FolderSource, ImageSource, ZipSource
from lightning_n2uq.utils.preprocessing import Preprocessing


@dataclass(frozen=True)
class Prepared:
    """One image as the network takes it.

    Attributes:
        index: Its place in the list of files.
        pixels: `[C, H, W]` float32, normalized; None for a broken file.
        error: What is wrong with a broken file; empty otherwise.
    """

    index: int
    pixels: Tensor | None
    error: str


def find_images(path: str, argument: str) -> tuple[ImageSource, list[str]]:
    """Returns a source and the names of the images in it.

    Args:
        path: An image, a folder or a .zip.
        argument: The user's name for the path, used in errors.

    Raises:
        ValueError: Nothing is there, or no images.
    """
    place = existing_path(argument, path, "an image, a folder of images or a .zip")
    if place.is_file() and not zipfile.is_zipfile(place) and place.suffix.lower() != ".zip":
        return FolderSource(place.parent), [place.name]
    try:
        source: ImageSource = FolderSource(place) if place.is_dir() else ZipSource(place)
    except ValueError as error:
        raise ValueError(str(error).replace("root", argument, 1)) from error
    names = source.images("")
    if not names:
        raise ValueError(f"{argument}: got {path!r}, which holds no images ({', '.join(SUFFIXES)})")
    return source, names


class LooseImages(Dataset[Prepared]):
    """Image files without labels, prepared as a network was trained.

    Args:
        source: The folder or archive.
        names: The files in it.
        steps: Resize, crop and normalization.
    """

    def __init__(self, source: ImageSource, names: list[str], steps: Preprocessing) -> None:
        self.source = source
        self.names = names
        self.steps = steps
        self._transform = eval_transform(steps.crop, steps.resize)
        # Image files have 8 bits: their 255 is what the data set's `pixel_scale` stands for.
        self._mean, self._std = (torch.tensor(values).view(-1, 1, 1) for values in (steps.mean, steps.std))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Prepared:
        """Returns one image, or what is wrong with it."""
        name = self.names[index]
        try:
            image = decode(self.source.read(name), self.source.where(name), self.steps.channels)
        except (BrokenImageError, OSError) as error:
            return Prepared(index, None, " ".join(str(error).split()))
        resized = self._transform(image)
        array = np.array(resized).reshape(resized.height, resized.width, self.steps.channels)
        pixels = torch.from_numpy(array).permute(2, 0, 1).float()
        return Prepared(index, pixels.sub_(self._mean * 255).div_(self._std * 255), "")


def stacked(items: list[Prepared]) -> tuple[list[int], Tensor | None, list[tuple[int, str]]]:
    """Returns the indices and the pixels `[B, C, H, W]` of a batch's whole images, and its broken ones.

    A broken file is an item, not an exception: a loader's worker could only name the first one.
    """
    whole = [item for item in items if item.pixels is not None]
    broken = [(item.index, item.error) for item in items if item.pixels is None]
    pixels = [item.pixels for item in whole if item.pixels is not None]
    return [item.index for item in whole], torch.stack(pixels) if pixels else None, broken
