"""Compiled kernels on the disk, where a damaged entry or a full disk costs time and ends no run.

Numba's own cache unpickles whatever it finds: an entry that a crash or a full disk has cut short ends every
later run, and a flipped bit in machine code may do anything. Here an entry is sealed with a digest, one that
does not fit is compiled and written anew, and where nothing can be written a process keeps its kernels to
itself. The folder is the one that numba chooses. What lies there is machine code, to be trusted like Python's
own bytecode: the digest tells damage, not who wrote an entry.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import uuid
import warnings
from pathlib import Path
from typing import Any, TypeVar

import numba
from numba.core.caching import FunctionCache
from numba.core.serialize import dumps

from lightning_n2uq.utils import compat

_SEAL = hashlib.sha256().digest_size
_said: set[str] = set()

Kernel = TypeVar("Kernel")


class DamagedEntryError(ValueError):
    """The file of a compiled kernel is cut short or altered; the message is one line."""


class KernelFiles:
    """The entries of one function: a file per signature, replaced as a whole.

    Args:
        folder: Where they are.
        name: What their names begin with.
        stamp: Says which source they were compiled from.
    """

    def __init__(self, folder: str, name: str, stamp: object) -> None:
        self._folder, self._name, self._stamp = Path(folder), name, (numba.__version__, stamp)

    def load(self, key: tuple[Any, ...]) -> Any:  # noqa: ANN401 -- numba's
        """Returns an entry, None where there is none of this source.

        Raises:
            DamagedEntryError: Its digest does not fit.
        """
        path = self._path(key)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        if hashlib.sha256(content[_SEAL:]).digest() != content[:_SEAL]:
            raise DamagedEntryError(f"{path.name!r} is cut short or altered")
        stamp, saved, data = pickle.loads(content[_SEAL:])
        return data if (stamp, saved) == (self._stamp, key) else None

    def save(self, key: tuple[Any, ...], data: object) -> None:
        """Writes an entry: as a whole, or not at all."""
        content = dumps((self._stamp, key, data))  # type: ignore[no-untyped-call]
        path = self._path(key)
        partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:16]}")
        try:
            partial.write_bytes(hashlib.sha256(content).digest() + content)
            partial.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise

    def flush(self) -> None:
        """Removes all entries."""
        for path in self._folder.glob(f"{self._name}.*.kernel"):
            path.unlink(missing_ok=True)

    def _path(self, key: tuple[Any, ...]) -> Path:
        signature = hashlib.sha256(repr(key[:2]).encode()).hexdigest()[:16]  # the code's hash is inside
        return self._folder / f"{self._name}.{signature}.kernel"


class KernelCache(FunctionCache):  # type: ignore[misc]  # numba has no types
    """Numba's cache of a function, kept in `KernelFiles`; nothing that happens to them ends a run."""

    def __init__(self, function: Any) -> None:  # noqa: ANN401
        super().__init__(function)  # type: ignore[no-untyped-call]
        self._place, name, stamp = compat.kernel_place(self)
        files: Any = KernelFiles(self._place, name, stamp)
        self._cache_file = files

    def load_overload(self, signature: Any, context: Any) -> Any:  # noqa: ANN401
        """Returns the compiled kernel, None where it has to be compiled (again)."""
        try:
            return super().load_overload(signature, context)  # type: ignore[no-untyped-call]
        except Exception as error:  # unpickling and linking damaged entries raises almost anything
            self._say(f"an entry cannot be used and is compiled anew ({_reason(error)})")
            return None

    def save_overload(self, signature: Any, result: Any) -> None:  # noqa: ANN401
        """Keeps a compiled kernel if that is possible."""
        try:
            super().save_overload(signature, result)  # type: ignore[no-untyped-call]
        except OSError as error:
            self._say(f"kernels cannot be kept and are compiled by every process ({_reason(error)})")
            self.disable()  # type: ignore[no-untyped-call]

    def _say(self, text: str) -> None:
        """Warns once per folder: where one entry is damaged, most others are."""
        if self._place not in _said:
            _said.add(self._place)
            place = "NUMBA_CACHE_DIR" if os.environ.get("NUMBA_CACHE_DIR") else "kernel cache"
            warnings.warn(f"{place}: {self._place!r}: {text}", RuntimeWarning, stacklevel=2)


def cached(kernel: Kernel) -> Kernel:
    """Returns a kernel made by `numba.njit` that keeps on disk what it compiles, where there is a place."""
    function: Any = kernel
    with contextlib.suppress(RuntimeError):  # numba found no folder that can be written
        compat.set_kernel_cache(function, KernelCache(function.py_func))
    return kernel


def _reason(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return f"{type(error).__name__}: {' '.join(text.split())[:200]}"
