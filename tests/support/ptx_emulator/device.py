"""Compiled Triton kernels on CPU tensors: compiled for a GPU that is not there, then emulated.

Triton's interpreter runs the Python of a kernel. This runs what the compiler makes of it: layouts of threads,
vectors of memory, exchanges by shuffles and shared memory, rounding as a GPU rounds.
"""

import inspect
import math
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest import mock

import numpy as np
import pytest
import torch

from lightning_n2uq.ops import dispatch
from ptx_emulator.code import Kernel, fusable, parse
from ptx_emulator.machine import Machine
from ptx_emulator.memory import Fault, GlobalMemory, Integers


class EmulatedDriver:
    """As much of a driver as Triton needs to compile."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> str:  # a name of its own, as Triton keeps compiled kernels by device
        return f"emulated sm_{self.capability}"

    def get_current_stream(self, device: object) -> int:
        return 0

    def get_current_target(self) -> object:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)


@dataclass
class Emulation:
    """Launches by kernel, and the kernels that were compiled for them."""

    launches: Counter[str] = field(default_factory=Counter)
    kernels: dict[str, Kernel] = field(default_factory=dict)


CAPABILITY = int(os.environ.get("PTX_CAPABILITY", "90"))


@contextmanager
def emulated_gpu(capability: int = CAPABILITY, last: int | None = None) -> Iterator[Emulation]:
    """Operators on CPU tensors run the kernels compiled for `sm_{capability}`.

    Args:
        capability: of the GPU.
        last: how many programs of every launch run, the last ones; all without.
    """
    pytest.importorskip("triton")
    from triton.runtime import driver, jit

    from lightning_n2uq.ops.backends.triton.product import INTERPRETED

    assert not INTERPRETED.value
    compiled_by, seen = jit.JITFunction.run, Emulation()

    def run(function, *args, grid, warmup=False, **options):
        compiled = compiled_by(function, *args, grid=grid, warmup=True, **options)
        if compiled.hash not in seen.kernels:
            seen.kernels[compiled.hash] = _checked(parse(compiled.asm["ptx"]), compiled.metadata)
        bound = inspect.signature(function.fn).bind_partial(*args).arguments
        bound |= {name: value for name, value in options.items() if name in function.arg_names}
        held = {name: bound[name] for name, kind in compiled.src.signature.items() if kind != "constexpr"}
        shape = grid(bound) if callable(grid) else grid
        number = math.prod(shape)
        chosen = np.arange(0 if last is None else max(0, number - last), number)
        values, shared = list(held.values()), compiled.metadata.shared
        _launch(seen.kernels[compiled.hash], (*shape, 1, 1)[:3], values, shared, chosen)
        seen.launches[function.__name__] += 1
        return compiled

    dispatch._choose_from.cache_clear()
    attribute = "_active" if hasattr(driver, "_active") else "active"  # the latter up to Triton 3.4
    try:
        with (
            mock.patch.object(driver, attribute, EmulatedDriver(capability)),
            mock.patch.object(jit.JITFunction, "run", run),
            mock.patch.object(dispatch, "_obstacle", return_value=None),
        ):
            yield seen
    finally:
        dispatch._choose_from.cache_clear()


def _checked(kernel: Kernel, metadata) -> Kernel:
    if metadata.enable_fp_fusion and (sums := fusable(kernel)):
        raise Fault(f"{kernel.name}: the assembler may fuse a product with {sums[0]}")
    return kernel


def _launch(
    kernel: Kernel, grid: tuple[int, int, int], arguments: list, shared_bytes: int, chosen: Integers
) -> None:
    tensors = [a.untyped_storage() for a in arguments if isinstance(a, torch.Tensor)]
    memory = GlobalMemory({(t.data_ptr(), t.nbytes()) for t in tensors})
    values = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
    values += [0] * (len(kernel.parameters) - len(values))  # scratch memory, which no kernel asks for
    Machine(kernel, grid, values, memory, shared_bytes, chosen).run()
