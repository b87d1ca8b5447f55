"""Image files in a folder or in a .zip of that folder, which is read in place."""

import os
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

from lightning_n2uq.datamodules._data.decode import BrokenImageError

MAX_BYTES = 2**28  # 256 MiB of one encoded image: an archive of a few megabytes may claim any size
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")


class ImageSource(ABC):
    """Files below one root, by their names relative to it (with `/`, whatever the system)."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @abstractmethod
    def folders(self, under: str) -> list[str]:
        """Returns the sorted names of the folders directly in `under`; none where that does not exist."""

    @abstractmethod
    def images(self, under: str) -> list[str]:
        """Returns the sorted names of all image files anywhere below `under`; `""` is the root."""

    @abstractmethod
    def has_images(self, under: str) -> bool:
        """Returns whether there is an image file anywhere below `under`."""

    def read(self, name: str) -> bytes:
        """Returns a file's bytes.

        Raises:
            BrokenImageError: The file has more than `MAX_BYTES`, or its bytes cannot be unpacked.
        """
        size = self._size(name)
        if size > MAX_BYTES:
            raise BrokenImageError(
                f"broken image file {self.where(name)}: {size} bytes, allowed are {MAX_BYTES}"
            )
        return self._bytes(name)

    @abstractmethod
    def _size(self, name: str) -> int:
        """Returns a file's length in bytes, without reading it."""

    @abstractmethod
    def _bytes(self, name: str) -> bytes:
        """Reads a file whose size is allowed."""

    @abstractmethod
    def stamp(self, name: str) -> str:
        """Returns a short text that changes when the file's content does."""

    def where(self, name: str) -> str:
        """Returns the path by which a user would look for a file."""
        return f"{self.root}/{name}"


class FolderSource(ImageSource):
    """Files on disk."""

    def folders(self, under: str) -> list[str]:
        """Lists folders; hidden ones are left out."""
        path = self.root / under
        if not path.is_dir():
            return []
        with os.scandir(path) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and entry.name[0] != ".")

    def images(self, under: str) -> list[str]:
        """Lists image files; links to folders are followed, hidden folders are not."""
        return sorted(self._walk(under))

    def has_images(self, under: str) -> bool:
        """Looks until it finds one."""
        return next(self._walk(under), None) is not None

    def _walk(self, under: str) -> Iterator[str]:
        for folder, folders, files in os.walk(self.root / under, followlinks=True):
            folders[:] = [name for name in folders if name[0] != "."]
            place = Path(folder).relative_to(self.root).as_posix()
            prefix = below("" if place == "." else place)
            yield from (f"{prefix}{file}" for file in files if is_image(file))

    def _size(self, name: str) -> int:
        return (self.root / name).stat().st_size

    def _bytes(self, name: str) -> bytes:
        return (self.root / name).read_bytes()

    def stamp(self, name: str) -> str:
        """Returns the size and the time of the last change."""
        status = (self.root / name).stat()
        return f"{status.st_size}:{status.st_mtime_ns}"


class ZipSource(ImageSource):
    """Files inside an archive; one folder around everything (`imagenet-sample/val/...`) is stepped into.

    Each process opens the archive for itself: a file handle shared with a forked loader process would have
    one read position for both.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._opened: tuple[int, zipfile.ZipFile] | None = None
        names = [info.filename for info in self._archive().infolist() if not _is_hidden(info.filename)]
        tops = {name.split("/", 1)[0] for name in names}
        only = next(iter(tops)) if len(tops) == 1 else ""
        whole = all(name.startswith(f"{only}/") for name in names)
        around = whole and only not in ("", "train", "val", "test")
        self._prefix = f"{only}/" if around else ""
        self._names = sorted(name.removeprefix(self._prefix) for name in names)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_opened": None}

    def _archive(self) -> zipfile.ZipFile:
        if self._opened is None or self._opened[0] != os.getpid():
            try:
                self._opened = os.getpid(), zipfile.ZipFile(self.root)
            except zipfile.BadZipFile as error:
                raise ValueError(f"root: got '{self.root}', which is no readable .zip: {error}") from error
        return self._opened[1]

    def folders(self, under: str) -> list[str]:
        """Implements `ImageSource`."""
        inside = (name.removeprefix(below(under)) for name in self._names if name.startswith(below(under)))
        folders = {name.split("/", 1)[0] for name in inside if "/" in name}
        return sorted(folders)

    def images(self, under: str) -> list[str]:
        """Implements `ImageSource`."""
        return [name for name in self._names if name.startswith(below(under)) and is_image(name)]

    def has_images(self, under: str) -> bool:
        """Implements `ImageSource`."""
        return any(name.startswith(below(under)) and is_image(name) for name in self._names)

    def _size(self, name: str) -> int:
        return self._archive().getinfo(self._prefix + name).file_size

    def _bytes(self, name: str) -> bytes:
        try:
            return self._archive().read(self._prefix + name)  # at most the size that the directory states
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise BrokenImageError(f"broken image file {self.where(name)}: {error}") from error

    def stamp(self, name: str) -> str:
        """Returns the size and the checksum from the archive's directory."""
        info = self._archive().getinfo(self._prefix + name)
        return f"{info.file_size}:{info.CRC:08x}"


def below(under: str) -> str:
    """Returns the beginning of all names in a folder; `""` is the root."""
    return f"{under}/" if under else ""


def _is_hidden(name: str) -> bool:
    """Returns whether a name in an archive is in a hidden folder, or what macOS puts beside packed files."""
    parts = name.split("/")
    return parts[0] == "__MACOSX" or any(part[0:1] == "." and part.strip(".") for part in parts)


def is_image(name: str) -> bool:
    """Returns whether the name is that of a visible file with an image's suffix."""
    last = name.rsplit("/", 1)[-1]
    return last[0:1] not in ("", ".") and last.lower().endswith(SUFFIXES)


def open_source(root: Path) -> ImageSource:
    """Returns a folder or a .zip as a source of images."""
    return FolderSource(root) if root.is_dir() else ZipSource(root)
