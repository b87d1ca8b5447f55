"""`python -m benchmarks.instructions`: what the CUDA kernels cost per value, without a GPU.

Triton compiles the kernels for a Hopper GPU (sm_90) and its own tools take the machine code apart: registers
of a thread, bytes it spills, and in the longest loop (or in all, where there is none) instructions per value
and barriers, at which a program's threads wait for one another. The limit is what four schedulers of a
multiprocessor issue in the time that memory needs for the value's bytes: a kernel with more instructions than
that is bound by arithmetic. What a program does once is left out, and so is waiting.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

OUTPUT = Path(__file__).resolve().parent / "results" / "instructions.json"
BYTES_PER_CYCLE = 2.97e12 / 132 / 1.755e9  # of a multiprocessor of an H100, at the measured rate of a copy
SCHEDULERS, WARP = 4, 32
MAPS = ("x_ptr", "y_ptr", "grad_ptr", "dx_ptr", "other_ptr", "dother_ptr")
OTHERS = {"packed_ptr": "*u8", "taps_ptr": "*u8", "sums_ptr": "*fp64", "climbs_ptr": "*fp64"}
ALIGNED = ("channels", "row_bytes", "height", "width", "numel")  # divisible by 16 in a usual network


class Case(NamedTuple):
    """A kernel as a network uses it.

    Attributes:
        title: what is printed.
        module: of `lightning_n2uq.ops.backends.triton`.
        kernel: its name there.
        constants: compile-time arguments.
        bytes: moved per value, in bfloat16 maps and codes of `N`.
        values: of a thread per iteration.
        data: Triton's name of the maps' dtype.
    """

    title: str
    module: str
    kernel: str
    constants: dict[str, Any]
    bytes: float
    values: int = 4
    data: str = "bf16"


class Cost(NamedTuple):
    """Registers and spilled bytes of a thread, barriers in a loop, instructions per value."""

    registers: int
    spilled: int
    barriers: int
    instructions: float


def _chain(n: int) -> list[Case]:
    bits, held = (2, 4) if n == 3 else (4, 16)
    code = bits / 8
    own = {"N": n, "HELD": held, "BITS": bits, "ACT": True, "COLUMNS": 64, "LANES": 128}
    name = f"chain, {n.bit_length()} bits"
    return [
        Case(f"{name}, forward", "fused_activation", "_forward_kernel", {**own, "NORM": False}, 4 + code),
        Case(f"{name}, backward", "fused_activation", "_sums_kernel", {**own, "NORM": False}, 6 + code),
        Case(
            f"{name}, behind a norm: sums",
            "fused_activation",
            "_sums_kernel",
            {**own, "NORM": True},
            4 + code,
        ),
        Case(f"{name}, behind a norm: input", "fused_activation", "_input_kernel", own, 6 + code),
    ]


def _quantizer(n: int, data: str, size: int) -> list[Case]:
    held = {"HELD": n + 1, "CHUNKS": 1, "FIFTEEN": n == 15, "RAMPED": False, "CENTRED": False, "LANES": 128}
    name, module = f"quantizer, {n.bit_length()} bits, {data}", "threshold"
    return [
        Case(f"{name}, forward", module, "_forward_kernel", held, 2 * size, 4, data),
        Case(f"{name}, backward", module, "_backward_kernel", {**held, "WRITES": True}, 3 * size, 4, data),
    ]


BLOCK = {"OTHER": False, "COLUMNS": 64, "LANES": 128}
STEM = {"KERNEL": 3, "STRIDE": 2, "PADDING": 1, "WIDE": False, "COLUMNS": 64, "LANES": 128}
SIZES = {"fp32": 4, "bf16": 2}
CASES = [
    *(case for n in (3, 7, 15) for data in SIZES for case in _quantizer(n, data, SIZES[data])),
    *_chain(3),
    *_chain(15),
    Case("block's end, forward", "residual", "_forward_kernel", BLOCK, 6),
    Case("block's end, sums", "residual", "_sums_kernel", BLOCK, 6),
    Case("block's end, inputs", "residual", "_input_kernel", BLOCK, 10),
    Case("stem, forward, per output", "stem", "_forward_kernel", {**STEM, "GROUP": 8}, 11, 8),
    Case("stem, sums, per output", "stem", "_sums_kernel", STEM, 11),
    Case("stem, input", "stem", "_input_kernel", {**STEM, "GROUP": 8}, 4.75, 8),
]


def measure(case: Case) -> Cost:
    """Compiles a kernel and counts."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from lightning_n2uq.ops.backends.triton.product import FUSED

    kernel = getattr(
        importlib.import_module(f"lightning_n2uq.ops.backends.triton.{case.module}"), case.kernel
    )
    types = dict.fromkeys(MAPS, f"*{case.data}") | OTHERS
    names = [name for name in kernel.arg_names if name not in case.constants]
    constants = {name: value for name, value in case.constants.items() if name in kernel.arg_names}
    signature = dict.fromkeys(kernel.arg_names, "constexpr")
    signature |= {name: types.get(name, "*fp32") if name.endswith("_ptr") else "i32" for name in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if name.endswith("_ptr") or name in ALIGNED
    }
    source = ASTSource(kernel, signature, constants, aligned)
    compiled = compile(source, target=GPUTarget("cuda", 90, WARP), options=FUSED)
    return _count(compiled.asm["cubin"], case.values)


def _count(cubin: bytes, values: int) -> Cost:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin", delete=False) as file:
        file.write(cubin)
    try:
        usage, code = (
            subprocess.run(
                [tools / tool, option, file.name], check=True, capture_output=True, text=True
            ).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    finally:
        os.unlink(file.name)
    used = {word: int(number) for word, number in re.findall(r"(REG|STACK):(\d+)", usage)}
    loop = longest_loop(code)
    barriers = sum("BAR.SYNC" in instruction for instruction in loop)
    return Cost(used["REG"], used["STACK"], barriers, len(loop) / values)


def longest_loop(code: str) -> list[str]:
    """Instructions of the longest loop of disassembled code, or all of them but padding."""
    found, longest, labels = list[str](), list[str](), dict[str, int]()
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L\w+):", line):
            labels[label[1]] = len(found)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            if re.match(r"(@!?U?P\w+\s+)?NOP", instruction[1]):
                continue
            found.append(instruction[1])
            target = re.search(r"BRA.*`\((\.L\w+)\)", instruction[1])
            if target and len(found) - labels.get(target[1], len(found)) > len(longest):
                longest = found[labels[target[1]] :]
    return longest if len(longest) > 8 else found  # a program may end by branching to itself


def main(argv: list[str] | None = None) -> int:
    """Prints and writes the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.instructions", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--output", type=Path, default=OUTPUT)
    chosen = parser.parse_args(argv)
    rows: dict[str, object] = {"triton": metadata.version("triton")}
    print(f"{'kernel':<38} registers  spilled  barriers  instructions per value  limit")
    for case in CASES:
        cost, limit = measure(case), case.bytes * WARP / BYTES_PER_CYCLE * SCHEDULERS
        rows[case.title] = {**cost._asdict(), "limit": round(limit, 1)}
        numbers = (
            f"{cost.registers:9} {cost.spilled:8} {cost.barriers:9} {cost.instructions:23.1f} {limit:6.0f}"
        )
        print(f"{case.title:<38} {numbers}", flush=True)
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    chosen.output.write_text(json.dumps(rows, indent=2) + "\n")
    print(f"written: {chosen.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
