"""PTX, the assembly that Triton writes for NVIDIA GPUs, read into a list of instructions."""

import re
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

TYPES = {
    "b": {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64},
    "u": {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64},
    "s": {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64},
    "f": {16: np.float16, 32: np.float32, 64: np.float64},
}
LABEL = re.compile(r"\s*(\$[\w$]+):")
REGISTERS = re.compile(r"\s*\.reg\s+\.(\w+)\s+(%\w+?)<\d+>;")
STATEMENT = re.compile(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)(?:\s+([^;]*))?;")
OPERAND = re.compile(r"\{([^}]*)\}|\[([^\]]*)\]|([^,\s]+)")


class Address(NamedTuple):
    """`[base+offset]`."""

    base: str
    offset: int


class Instruction(NamedTuple):
    """`@guard name.modifiers operands`, and the line of Python that it comes from."""

    guard: str | None
    negated: bool
    name: str
    modifiers: tuple[str, ...]
    operands: list[str | list[str] | Address]
    line: str

    @property
    def kind(self) -> str:
        return self.modifiers[-1]

    def __str__(self) -> str:
        return f"{'.'.join((self.name, *self.modifiers))} {self.operands} ({self.line})"


@dataclass
class Kernel:
    name: str
    threads: int
    parameters: dict[str, str]
    registers: dict[str, str] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    code: list[Instruction] = field(default_factory=list)


def bits_of(kind: str) -> int:
    """Of `b32`, `f64`, `bf16`, and of pairs such as `f32x2`."""
    each, _, count = kind.lstrip("bfsu").partition("x")
    return int(each) * int(count or 1)


def type_of(kind: str) -> type:
    """What holds it; a pair is held as bits."""
    return np.bool_ if kind == "pred" else TYPES["b" if "x" in kind else kind[0]][bits_of(kind)]


def parse(ptx: str) -> Kernel:
    """The one kernel of `ptx`."""
    head, body = ptx[ptx.index(".entry") :].split("{", 1)
    name, threads = re.search(r"\.entry (\w+)", head), re.search(r"\.reqntid (\d+)", head)
    assert name is not None
    assert threads is not None
    parameters = {m[2]: m[1] for m in re.finditer(r"\.param \.(\w+)[^,\n)]*?(\w+_param_\d+)", head)}
    kernel = Kernel(name[1], int(threads[1]), parameters)
    line = ""
    for text in body.splitlines():
        statement, _, comment = text.partition("//")
        if statement.lstrip().startswith(".loc"):
            line = comment.strip() or line
        elif label := LABEL.match(statement):
            kernel.labels[label[1]] = len(kernel.code)
        elif declared := REGISTERS.match(statement):
            kernel.registers[declared[2]] = declared[1]
        elif not statement.lstrip().startswith("."):
            kernel.code += [_instruction(*m.groups(), line) for m in STATEMENT.finditer(statement)]
    return kernel


def _instruction(
    negated: str | None, guard: str | None, name: str, rest: str | None, line: str
) -> Instruction:
    name, *modifiers = name.replace("::cta", "").split(".")
    operands: list[str | list[str] | Address] = []
    for vector, address, plain in OPERAND.findall(rest or ""):
        if vector:
            operands.append([part.strip() for part in vector.split(",")])
        elif address:
            base, _, offset = address.replace(" ", "").partition("+")
            operands.append(Address(base, int(offset or 0)))
        else:
            operands.append(plain)
    return Instruction(guard, bool(negated), name, tuple(modifiers), operands, line)


def fusable(kernel: Kernel) -> list[Instruction]:
    """Sums of products that the assembler may still fuse: the product does not say how it is rounded."""
    products, found = set(), []
    for instruction in kernel.code:
        result, *sources = instruction.operands or [""]
        is_sum = instruction.name in ("add", "sub") and {"f32", "f64"} & set(instruction.modifiers)
        if is_sum and products.intersection(source for source in sources if isinstance(source, str)):
            found.append(instruction)
        if not isinstance(result, str):
            continue
        products.discard(result)
        if instruction.name == "mul" and instruction.modifiers in (("f32",), ("f64",)):
            products.add(result)
    return found
