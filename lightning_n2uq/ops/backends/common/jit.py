"""How CPU kernels are compiled: numba, without the interpreter lock, cached on disk if possible."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_n2uq.ops.backends.common.kernel_cache import cached
from lightning_n2uq.ops.backends.common.threads import run_ranges

Array: TypeAlias = "npt.NDArray[Any]"
Number: TypeAlias = "np.floating[Any]"

Function = TypeVar("Function", bound=Callable[..., Any])

_NO_ENTRY: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}


def compiled(function: Function) -> Function:
    """Returns a kernel, called from Python and compiled at first use for the argument types given.

    Strict IEEE arithmetic, no interpreter lock, cached on disk. Where neither the package's folder nor the
    user's cache folder can be written, every process compiles anew. A cached kernel is renewed when its own
    file changes, not when a file it calls into does.
    """
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "no_cfunc_wrapper": True}
    return cached(cast("Function", numba.njit(**options)(function)))


def helper(function: Function) -> Function:
    """Returns what only kernels call: without an entry from Python, and cached as a part of them."""
    return cast("Function", numba.njit(error_model="numpy", **_NO_ENTRY)(function))


def summing(function: Function) -> Function:
    """Returns a `helper` with leave to reorder sums, for the vector units; NaN and infinity keep."""
    options: dict[str, Any] = {"error_model": "numpy", "fastmath": {"reassoc"}, **_NO_ENTRY}
    return cast("Function", numba.njit(**options)(function))


def array(x: Tensor) -> Array:
    """Returns the array that shares memory with a CPU tensor; bfloat16, which numpy lacks, as int16."""
    x = x.detach() if x.requires_grad else x
    x = x.view(torch.int16) if x.dtype == torch.bfloat16 else x
    # `numpy()` takes from the memory that it can be resized, as `fully_shard` does with parameters.
    return np.from_dlpack(x) if dist.is_available() and dist.is_initialized() else x.numpy()


def padded(values: Array, multiple: int, fill: float) -> Array:
    """Returns `values` with `fill` appended until their number is a multiple of `multiple`."""
    return np.concatenate([values, np.full(-len(values) % multiple, fill, values.dtype)])


def run_chunks(kernel: Callable[..., None], chunks: int, smallest: int, *arguments: Any) -> None:  # noqa: ANN401
    """Calls `kernel(first, last, *arguments)` on ranges that cover the chunks `0 .. chunks - 1`, in parallel.

    Args:
        kernel: Made by `compiled`; writes only what belongs to its chunks and never adds across them, so that
            the number of threads changes no bit.
        chunks: The number of chunks.
        smallest: The fewest chunks that are worth a thread of their own.
        *arguments: Passed on to every call.
    """
    run_ranges(lambda first, last: kernel(first, last, *arguments), chunks, smallest)
