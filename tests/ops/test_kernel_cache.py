"""Compiled kernels on the disk: whatever happens to the files, calls give their results."""

import errno
import os
import warnings
from pathlib import Path

import numba
import numpy as np
import pytest

from lightning_n2uq.ops.backends.common import jit, kernel_cache

# What numba imports at its first compilation warns of torch.jit.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")

SOURCE = """
def twice_each(x, y):
    for i in range(x.size):
        y[i] = 2 * x[i]
"""


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A kernel's file and, in `tmp_path / "cache"`, the place of what is compiled of it."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(kernel_cache, "_said", set())
    path = tmp_path / "kernels.py"
    path.write_text(SOURCE)
    return path


def fresh(path):
    """The kernel as a new process would have it."""
    names = {}
    exec(compile(path.read_text(), str(path), "exec"), names)
    return jit.compiled(names["twice_each"])


def result(kernel, dtype=np.float32):
    x = np.arange(4, dtype=dtype)
    y = np.zeros_like(x)
    kernel(x, y)
    return y.tolist()


def hits(kernel):
    return sum(kernel.stats.cache_hits.values())


def entries(source):
    return sorted((source.parent / "cache").rglob("*.kernel"))


def test_an_entry_is_used_by_the_next_process(source):
    first = fresh(source)
    assert result(first) == [0, 2, 4, 6]
    assert hits(first) == 0
    second = fresh(source)
    assert result(second) == [0, 2, 4, 6]
    assert hits(second) == 1
    assert result(second, np.float64) == [0, 2, 4, 6]  # another signature, another entry
    assert len(entries(source)) == 2


def test_another_source_is_compiled_and_replaces_the_entry(source):
    result(fresh(source))
    source.write_text(SOURCE.replace("2 *", "3 *"))
    os.utime(source, (1, 1))
    changed = fresh(source)
    assert result(changed) == [0, 3, 6, 9]
    assert hits(changed) == 0
    assert len(entries(source)) == 1


def _cut(content):
    return content[: len(content) // 2]


def _flip(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 16]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", [_cut, _flip, lambda _: b"", lambda content: content + b"x"])
def test_a_damaged_entry_is_named_and_compiled_anew(source, damage):
    result(fresh(source))
    (entry,) = entries(source)
    entry.write_bytes(damage(entry.read_bytes()))
    with pytest.warns(RuntimeWarning, match="kernel cache: .*cut short or altered") as said:
        assert result(fresh(source)) == [0, 2, 4, 6]
    assert str(source.parent / "cache") in str(said[0].message)
    renewed = fresh(source)
    assert result(renewed) == [0, 2, 4, 6]
    assert hits(renewed) == 1


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_where_nothing_can_be_written_every_process_compiles(source, monkeypatch, code):
    def fail(self, content):
        raise OSError(code, os.strerror(code), str(self))

    monkeypatch.setattr(Path, "write_bytes", fail)
    kernel = fresh(source)
    with pytest.warns(RuntimeWarning, match=f"compiled by every process .*{os.strerror(code)}"):
        assert result(kernel) == [0, 2, 4, 6]
    assert result(kernel, np.float64) == [0, 2, 4, 6]  # and no other warning, which would be an error
    assert entries(source) == []


def test_a_place_that_cannot_be_made_is_no_error(source, monkeypatch):
    def nowhere(self, function):
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr(kernel_cache.FunctionCache, "__init__", nowhere)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert result(fresh(source)) == [0, 2, 4, 6]


def test_every_kernel_of_the_package_is_kept_this_way():
    from lightning_n2uq.ops.backends.numba import gradient_codec, huffman, threshold_loops

    kernels = [
        kernel
        for module in (gradient_codec, huffman, threshold_loops)
        for kernel in vars(module).values()
        if hasattr(kernel, "py_func") and kernel.targetoptions.get("nogil")
    ]
    assert len(kernels) > 6
    assert {type(kernel._cache) for kernel in kernels} == {kernel_cache.KernelCache}
