# Compiled functions take no annotations: Triton infers the types of their arguments.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
"""Triton: launches that compilers see through, and products that no compiler fuses with a sum.

`torch.compile` passes kernels no options, so that fused multiply-adds, which round once where the oracle
rounds twice, cannot be switched off there; where the rounding matters, a product is written as one.
"""

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch._subclasses.fake_tensor import FakeTensor

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:  # noqa: ANN401
    """Runs a kernel; inside a `torch.library.triton_op` a compiler records it instead."""
    if INTERPRETED.value:  # the interpreter runs Python, which has nothing to record
        if not any(isinstance(argument, FakeTensor) for argument in arguments):
            kernel[grid](*arguments, **constants)
        return
    torch.library.wrap_triton(kernel)[grid](*arguments, **constants)


@triton.jit
def product(a, b):
    """`a * b` of equal shapes, float32 or float64, rounded on its own."""
    if INTERPRETED:
        result = a * b
    elif a.dtype == tl.float64:
        result = tl.inline_asm_elementwise(
            "mul.rn.f64 $0, $1, $2;", "=d,d,d", [a, b], dtype=tl.float64, is_pure=True, pack=1
        )
    else:
        result = tl.inline_asm_elementwise(
            "mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
        )
    return result
