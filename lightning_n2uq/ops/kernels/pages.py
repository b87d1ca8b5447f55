"""Large pages for large fresh results, whose page faults otherwise take longer than decoding."""

import ctypes
import functools
import sys
from collections.abc import Callable

from torch import Tensor

_HUGE = 2 << 20  # bytes of a large page on x86-64 and, with 4 KB base pages, on ARM
_SMALLEST = 32 << 20  # glibc keeps and reuses smaller blocks, whose pages are there already
_MADV_HUGEPAGE = 14


def advise_large_pages(fresh: Tensor) -> None:
    """Asks Linux to back a tensor by 2 MB pages; does nothing elsewhere, or for less than 32 MB.

    Only for memory that is about to be written as a whole: one byte takes a large page.

    Args:
        fresh: Contiguous CPU tensor not yet written to.
    """
    size = fresh.numel() * fresh.element_size()
    madvise = _madvise()
    if fresh.device.type != "cpu" or size < _SMALLEST or madvise is None:
        return
    start = -(-fresh.data_ptr() // _HUGE) * _HUGE
    stop = (fresh.data_ptr() + size) // _HUGE * _HUGE
    madvise(start, stop - start, _MADV_HUGEPAGE)  # advice: a kernel that refuses serves small pages


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    function = getattr(ctypes.CDLL(None), "madvise", None)
    if function is not None:
        function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function
