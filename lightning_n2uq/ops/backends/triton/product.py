# Compiled functions take no annotations: Triton infers the types of their arguments.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
"""Triton: products that the compiler does not fuse with a sum, and quotients that keep subnormal numbers.

A fused multiply-add rounds once where the reference rounds twice. Where that matters, a product is written as
one of its own; elsewhere fusing is welcome, and switching it off for a whole kernel (`enable_fp_fusion`)
makes LLVM turn the counting of comparisons into slower integer code. `tl.div_rn` of Triton before 3.6 takes
subnormal numbers for zero.
"""

import os

import triton
import triton.language as tl

FUSED = {"enable_fp_fusion": True}  # for every launch but the codec's; the default changes with Triton 3.10
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def product(a, b):
    """Returns `a * b` of equal shapes, float32 or float64, rounded on its own."""
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


@triton.jit
def divided(a, b):
    """Returns `a / b` of equal shapes, float32 or float64: the IEEE division."""
    if INTERPRETED or a.dtype == tl.float64:
        result = a / b
    else:
        result = tl.inline_asm_elementwise(
            "div.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
        )
    return result
