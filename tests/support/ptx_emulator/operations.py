"""What the instructions of PTX compute: a function each, of the instruction and a way to read its sources.

Results have the bits of a GPU: one rounding, to nearest even; subnormal numbers kept; one NaN.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np

from ptx_emulator.code import Instruction, bits_of, type_of
from ptx_emulator.memory import Fault


class Read(Protocol):
    """Source `i` of all threads (operand 0 is the result), of the instruction's kind unless told."""

    def __call__(self, i: int, kind: str | None = None) -> np.ndarray: ...


Operation = Callable[[Instruction, Read], np.ndarray]


def _one_nan(values: np.ndarray) -> np.ndarray:
    if values.dtype.kind != "f":
        return values
    nan = np.array(-1, f"i{values.dtype.itemsize}").view(f"u{values.dtype.itemsize}") >> 1
    return np.where(np.isnan(values), nan.view(values.dtype), values)


def _apply(instruction: Instruction, read: Read, operation: Callable[..., np.ndarray]) -> np.ndarray:
    """To all sources; to both halves of a pair (`f32x2`, `s16x2`); to float32 made of half precision."""
    if _mixed(instruction):
        *halves, last = range(1, len(instruction.operands))
        wide = [_widened(read(i, "b16"), instruction.kind) for i in halves]
        return _one_nan(operation(*wide, read(last, "f32")))
    sources = [read(i) for i in range(1, len(instruction.operands))]
    each, pair, _ = instruction.kind.partition("x2")
    if not pair:
        return _one_nan(operation(*sources))
    return _one_nan(operation(*(source.view(type_of(each)) for source in sources))).view(sources[0].dtype)


def _mixed(instruction: Instruction) -> bool:
    """Whether all sources but the last are half precision, the result float32 (`add.f32.bf16`)."""
    return instruction.modifiers[-2:] in (("f32", "bf16"), ("f32", "f16"))


def _widened(bits: np.ndarray, kind: str) -> np.ndarray:
    if kind == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return bits.view(np.float16).astype(np.float32)


def _arithmetic(operation: Callable[..., np.ndarray]) -> Operation:
    return lambda instruction, read: _apply(instruction, read, operation)


def _sign(operation: Callable[..., np.ndarray], bits: Callable[[np.ndarray, int], np.ndarray]) -> Operation:
    """`neg` or `abs`: of half precision by the sign bit."""

    def result(instruction: Instruction, read: Read) -> np.ndarray:
        if not instruction.kind.startswith(("bf16", "f16")):
            return _apply(instruction, read, operation)
        values = read(1)
        return bits(values.view(np.uint16), np.uint16(0x8000)).view(values.dtype)

    return result


def _multiply(instruction: Instruction, read: Read) -> np.ndarray:
    if instruction.kind == "f32x2":
        return _apply(instruction, read, np.multiply)
    return _product(instruction, read(1), read(2))


def _product(instruction: Instruction, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    bits, wide = bits_of(instruction.kind), {"wide", "hi"} & set(instruction.modifiers)
    if not wide:
        return _one_nan(a * b)
    if bits == 64:
        return np.array([(int(x) * int(y) >> 64) % 2**64 for x, y in zip(a, b, strict=True)], np.uint64)
    whole = type_of(f"{instruction.kind[0]}{2 * bits}")
    exact = a.astype(whole) * b.astype(whole)
    return exact if "wide" in wide else (exact >> whole(bits)).astype(a.dtype)


def _multiply_add(instruction: Instruction, read: Read) -> np.ndarray:
    product = _product(instruction, read(1), read(2))
    kind, bits = instruction.kind, bits_of(instruction.kind)
    return product + read(3, f"{kind[0]}{2 * bits}" if "wide" in instruction.modifiers else kind)


def fma32(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """`a * b + c` of float32, rounded once: the float64 sum is rounded to odd before it is rounded again."""
    product, addend = a.astype(np.float64) * b, c.astype(np.float64)
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    inexact = np.isfinite(total) & (error != 0)
    raw = total.view(np.int64)
    away = np.where((error > 0) == (total > 0), 1, -1)
    return np.where(inexact & (raw & 1 == 0), raw + away, raw).view(np.float64).astype(np.float32)


def _fma(instruction: Instruction, read: Read) -> np.ndarray:
    if instruction.kind == "f32x2" or _mixed(instruction):
        return _apply(instruction, read, fma32)
    a, b, c = read(1), read(2), read(3)
    if instruction.kind == "f64":  # to the last bit or so
        result = (a.astype(np.longdouble) * b + c).astype(np.float64)
    else:
        result = fma32(a, b, c)
    if "sat" in instruction.modifiers:
        return np.where(result > 0, np.minimum(result, 1), 0).astype(result.dtype)  # NaN: 0
    return _one_nan(result)


def _divide(instruction: Instruction, read: Read) -> np.ndarray:
    a, b = read(1), read(2)
    if instruction.kind[0] == "f":
        _ieee(instruction)
        return _one_nan(a / b)
    if (b == 0).any():
        raise Fault("division by zero")
    quotient = np.abs(a) // np.abs(b)
    return np.where((a < 0) != (b < 0), -quotient, quotient) if instruction.kind[0] == "s" else quotient


def _square_root(instruction: Instruction, read: Read) -> np.ndarray:
    _ieee(instruction)
    return _one_nan(np.sqrt(read(1)))


def _ieee(instruction: Instruction) -> None:
    if "rn" not in instruction.modifiers:
        raise Fault("not rounded as IEEE 754 says")


def _extreme(sign: int) -> Operation:
    numbers, strict = (np.fmax, np.maximum) if sign > 0 else (np.fmin, np.minimum)

    def result(instruction: Instruction, read: Read) -> np.ndarray:
        a, b = read(1), read(2)
        if instruction.kind[0] != "f":
            return strict(a, b)
        chosen = (strict if "NaN" in instruction.modifiers else numbers)(a, b)
        first = np.signbit(a) == (sign < 0)  # of zeros with two signs
        return _one_nan(np.where(a == b, np.where(first, a, b), chosen))

    return result


def _shift(left: bool) -> Operation:
    def result(instruction: Instruction, read: Read) -> np.ndarray:
        a, bits = read(1), bits_of(instruction.kind)
        count = read(2, "u32")
        held = np.minimum(count, bits - 1).astype(a.dtype)
        if instruction.kind[0] == "s":
            return a >> held
        return np.where(count >= bits, a.dtype.type(0), a << held if left else a >> held)

    return result


def _funnel_shift(instruction: Instruction, read: Read) -> np.ndarray:
    both = read(1, "b32").astype(np.uint64) | read(2, "b32").astype(np.uint64) << np.uint64(32)
    count = read(3, "u32")
    count = (count & 31 if "wrap" in instruction.modifiers else np.minimum(count, 32)).astype(np.uint64)
    return (both << count >> np.uint64(32) if "l" in instruction.modifiers else both >> count).astype(
        np.uint32
    )


def _extract(instruction: Instruction, read: Read) -> np.ndarray:
    a, bits = read(1), bits_of(instruction.kind)
    start, length = (int(read(i, "u32")[0]) for i in (2, 3))
    return a << a.dtype.type(bits - start - length) >> a.dtype.type(bits - length)


def _insert(instruction: Instruction, read: Read) -> np.ndarray:
    a, b = read(1), read(2)
    start, length = (int(read(i, "u32")[0]) for i in (3, 4))
    mask = a.dtype.type(((1 << length) - 1) << start)
    return a << a.dtype.type(start) & mask | b & ~mask


def _logic(instruction: Instruction, read: Read) -> np.ndarray:
    a, b, c, table = (read(i, "b32") for i in range(1, 5))
    result = np.zeros_like(a)
    for i in range(8):
        if int(table[0]) >> i & 1:
            result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return result


def _permute(instruction: Instruction, read: Read) -> np.ndarray:
    if instruction.modifiers != ("b32",):
        raise Fault("unknown mode")
    both = read(1).astype(np.uint64) | read(2).astype(np.uint64) << np.uint64(32)
    selector, result = read(3).astype(np.uint64), np.zeros(len(both), np.uint64)
    for i in range(4):
        chosen = selector >> np.uint64(4 * i)
        byte = both >> (np.uint64(8) * (chosen & np.uint64(7))) & np.uint64(255)
        sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        result |= np.where(chosen & np.uint64(8), sign, byte) << np.uint64(8 * i)
    return result.astype(np.uint32)


def _select(instruction: Instruction, read: Read) -> np.ndarray:
    return np.where(read(3, "pred"), read(1), read(2))


COMPARISONS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "eq": np.equal, "ne": lambda a, b: (a < b) | (a > b) if a.dtype.kind == "f" else a != b,
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
    "equ": lambda a, b: ~((a < b) | (a > b)), "neu": np.not_equal,
    "ltu": lambda a, b: ~(a >= b), "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b), "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)), "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}  # fmt: skip
COMBINED = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _compare(instruction: Instruction, read: Read) -> np.ndarray:
    comparison, *rest = instruction.modifiers
    result = COMPARISONS[comparison](read(1), read(2))
    return COMBINED[rest[0]](result, read(3, "pred")) if rest[0] in COMBINED else result


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The bits of float32 numbers as bfloat16, rounded to nearest even."""
    raw = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    rounded = raw + np.uint64(0x7FFF) + (raw >> np.uint64(16) & np.uint64(1)) >> np.uint64(16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded.astype(np.uint16))


def _narrowed(values: np.ndarray, kind: str) -> np.ndarray:
    return to_bfloat16(values) if kind == "bf16" else values.astype(np.float16).view(np.uint16)


ROUNDED = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _convert(instruction: Instruction, read: Read) -> np.ndarray:
    target, source = instruction.modifiers[-2:]
    if target.endswith("x2"):
        upper, lower = (_narrowed(read(i, source), target[:-2]).astype(np.uint32) for i in (1, 2))
        return upper << np.uint32(16) | lower
    values = _widened(read(1, "b16"), "bf16") if source == "bf16" else read(1, source)
    if target == "bf16":
        return to_bfloat16(values)
    wanted = type_of(target)
    mode = next((ROUNDED[m] for m in instruction.modifiers if m in ROUNDED), None)
    if values.dtype.kind != "f" or mode is None:
        if values.dtype.kind == "f" and target[0] != "f":
            raise Fault("a number becomes an integer, without a rounding")
        return values.astype(wanted)
    whole = mode(values)
    if target[0] == "f":
        return whole.astype(wanted)
    limits = np.iinfo(wanted)  # beyond them a GPU answers the nearest; NaN is 0
    inside = (whole >= float(limits.min)) & (whole < float(limits.max) + 1)
    nearest = np.where(np.isnan(whole), 0, np.where(whole < 0, limits.min, limits.max))
    return np.where(inside, np.where(inside, whole, 0).astype(wanted), nearest.astype(wanted))


def _population(instruction: Instruction, read: Read) -> np.ndarray:
    values = read(1).astype(np.uint64)
    return sum((values >> np.uint64(i) & np.uint64(1)) for i in range(64)).astype(np.uint32)


def _move(instruction: Instruction, read: Read) -> np.ndarray:
    return read(1)


def known(instruction: Instruction) -> bool:
    """Whether the function below computes numbers of this kind; any kind of integer and of bits it does."""
    name, kind = instruction.name, instruction.kind
    if name in ("cvt", "mov", "selp"):
        return True
    if kind.startswith(("bf16", "f16")):
        return name in ("neg", "abs") or (name in ("add", "sub", "fma") and _mixed(instruction))
    if "x2" in kind:
        return name in ("add", "sub") or (name in ("mul", "fma") and kind == "f32x2")
    return True


OPERATIONS: dict[str, Operation] = {
    "mov": _move, "cvta": _move, "cvt": _convert, "selp": _select, "setp": _compare,
    "add": _arithmetic(np.add), "sub": _arithmetic(np.subtract), "mul": _multiply, "mad": _multiply_add,
    "fma": _fma, "div": _divide, "rem": _arithmetic(np.fmod), "sqrt": _square_root,
    "neg": _sign(np.negative, lambda values, sign: values ^ sign),
    "abs": _sign(np.abs, lambda values, sign: values & ~sign), "min": _extreme(-1), "max": _extreme(1),
    "and": _arithmetic(np.bitwise_and), "or": _arithmetic(np.bitwise_or), "xor": _arithmetic(np.bitwise_xor),
    "not": _arithmetic(np.invert), "shl": _shift(left=True), "shr": _shift(left=False), "shf": _funnel_shift,
    "bfe": _extract, "bfi": _insert, "lop3": _logic, "prmt": _permute, "popc": _population,
}  # fmt: skip
