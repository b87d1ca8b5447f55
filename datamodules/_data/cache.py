"""Small images decoded once: one uint8 array per list of files, kept on disk between runs."""

import hashlib
import os
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lightning_n2uq.datamodules._data.decode import BrokenImageError, decode
from lightning_n2uq.datamodules._data.image_files import ImageSource
from lightning_n2uq.utils.atomic import replacing

_FORMAT = 1  # part of the key: raise it when `decode` or the array's layout changes


def default_cache_dir() -> Path:
    """Returns `$XDG_CACHE_HOME/lightning_n2uq`, by default `~/.cache/lightning_n2uq`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lightning_n2uq"


def load_decoded(
    source: ImageSource, names: list[str], size: int, channels: int, cache: Path | None
) -> Tensor:
    """Decodes files of one size, or reads the array that an earlier call left in `cache`.

    The array's name is a hash of every file's name, size and checksum (in an archive) or time (in a
    folder): a changed source never meets an old array.

    Args:
        source: The folder or archive of the files.
        names: The files, in the order of the result.
        size: The expected height and width in pixels.
        channels: 1 for greyscale, 3 for RGB.
        cache: The folder of the arrays; None keeps nothing on disk.

    Returns:
        Images `[N, C, size, size]` uint8. With a cache they are backed by its file (copy on write), so that
        the processes of one machine share the memory.

    Raises:
        BrokenImageError: A file cannot be decoded or has another size.
    """
    if cache is None:
        return torch.from_numpy(_decode_all(source, names, size, channels))
    path = cache / f"{_key(source, names, size, channels)}.npy"
    if not path.exists():
        array = _decode_all(source, names, size, channels)
        try:
            with replacing(path, shared=True) as partial, partial.open("wb") as file:
                np.save(file, array)
        except OSError as error:
            warnings.warn(f"decoded images are not cached: {error}", stacklevel=2)
            return torch.from_numpy(array)
    return torch.from_numpy(np.load(path, mmap_mode="c"))


def _key(source: ImageSource, names: list[str], size: int, channels: int) -> str:
    digest = hashlib.sha256(f"{_FORMAT} {size} {channels}".encode())
    for name in names:
        digest.update(f"\n{name} {source.stamp(name)}".encode())
    return digest.hexdigest()[:32]


def _decode_all(source: ImageSource, names: list[str], size: int, channels: int) -> np.ndarray:
    result = np.empty((len(names), channels, size, size), dtype=np.uint8)
    for row, name in zip(result, names, strict=True):
        image = decode(source.read(name), source.where(name), channels)
        if image.size != (size, size):
            found = f"{image.size[0]}x{image.size[1]}"
            raise BrokenImageError(f"broken image file {source.where(name)}: {found}, expected {size}x{size}")
        row[:] = np.asarray(image).reshape(size, size, channels).transpose(2, 0, 1)
    return result
