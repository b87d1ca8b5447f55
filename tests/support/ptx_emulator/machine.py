"""A GPU of numpy: all threads of a launch in step, so that a small launch takes a fraction of a second.

Of the threads, those at the lowest instruction go on, together; so they meet again behind a branch, and at a
barrier all threads of a program stand at once (or else it is a fault: a GPU would wait for ever).
"""

from collections.abc import Callable, Iterator

import numpy as np

from ptx_emulator.code import Address, Instruction, Kernel, bits_of, type_of
from ptx_emulator.memory import Bytes, Fault, GlobalMemory, Integers, SharedMemory
from ptx_emulator.operations import OPERATIONS, known

WARP = 32
SHARED = "global_smem"  # where Triton's shared memory begins
POISON = 0xDEADBEEF  # half of a pair that nothing was written to; what is made of it must not be used


class Machine:
    """One launch: registers of every thread, shared memory of every program.

    Args:
        kernel: what runs.
        grid: programs of the launch.
        arguments: one for each parameter; addresses as numbers.
        memory: what may be reached.
        shared_bytes: of a program.
        numbers: of the programs that run; all without.
    """

    def __init__(
        self, kernel: Kernel, grid: tuple[int, int, int], arguments: list[int | float], memory: GlobalMemory,
        shared_bytes: int, numbers: Integers | None = None,
    ) -> None:  # fmt: skip
        self.kernel, self.memory = kernel, memory
        self.arguments = dict(zip(kernel.parameters, arguments, strict=True))
        numbers = np.arange(int(np.prod(grid))) if numbers is None else numbers
        self.size = len(numbers) * kernel.threads
        self.programs, threads = np.divmod(np.arange(self.size), kernel.threads)
        self.numbers, self.warps = numbers[self.programs], threads // WARP
        self.shared = SharedMemory(len(numbers), shared_bytes)
        x, y, _ = grid
        fixed = {"%tid.x": threads, "%laneid": threads % WARP, "%ctaid.x": self.numbers % x}
        fixed |= {"%ctaid.y": self.numbers // x % y, "%ctaid.z": self.numbers // (x * y)}
        fixed |= {f"%nctaid.{axis}": np.full(self.size, n) for axis, n in zip("xyz", grid, strict=True)}
        self.fixed = {name: values.astype(np.uint32) for name, values in fixed.items()}
        self.registers: dict[str, np.ndarray] = {}
        self.places = np.zeros(self.size, np.int64)  # the next instruction of every thread
        self.effects: dict[str, Callable[[Instruction, Integers], None]] = {
            "ld": self._load, "st": self._store, "bar": self._barrier, "shfl": self._shuffle,
            "redux": self._reduce, "stmatrix": self._store_matrix, "ldmatrix": self._load_matrix,
        }  # fmt: skip

    def run(self) -> None:
        """Until every thread has returned."""
        end = len(self.kernel.code)
        with np.errstate(all="ignore"):
            while (at := int(self.places.min(initial=end))) < end:
                here = np.flatnonzero(self.places == at)
                ahead = self.places[self.places > at]
                self._run(here, at, int(ahead.min()) if len(ahead) else end)

    def _run(self, here: Integers, at: int, meeting: int) -> None:
        """Threads `here` go on up to a branch, or to where others wait."""
        while at < meeting:
            instruction = self.kernel.code[at]
            at += 1
            self.places[here] = at
            taken = here
            if instruction.guard:
                taken = here[self._read(instruction.guard, "pred", here) != instruction.negated]
            if instruction.name == "bra":
                self.places[taken] = self.kernel.labels[str(instruction.operands[0])]
                return
            if instruction.name == "ret":
                self.places[taken] = len(self.kernel.code)
                return
            if len(taken):
                self._execute(instruction, taken)

    def _execute(self, instruction: Instruction, threads: Integers) -> None:
        try:
            if effect := self.effects.get(instruction.name):
                effect(instruction, threads)
            elif instruction.name == "mov" and any(isinstance(o, list) for o in instruction.operands):
                self._repack(instruction, threads)
            else:
                operation, operands = OPERATIONS[instruction.name], instruction.operands
                kind = instruction.kind
                if not known(instruction):
                    raise Fault(f"arithmetic in {kind}")
                result = operation(instruction, lambda i, k=None: self._read(operands[i], k or kind, threads))
                self._write(operands[0], result, threads)
        except (Fault, KeyError) as error:
            raise Fault(f"{self.kernel.name}: {instruction}: {error}") from error

    def _read(self, name: object, kind: str, threads: Integers) -> np.ndarray:
        """A register or a constant, of `threads`, cut or filled up to the bits of `kind`."""
        wanted = type_of(kind)
        if str(name).startswith("!"):
            return ~self._read(str(name)[1:], kind, threads)
        values = self.fixed.get(str(name), self.registers.get(str(name)))
        if values is None:
            return np.full(len(threads), self._constant(str(name), wanted), wanted)
        values = values if len(threads) == self.size else values[threads]
        if values.dtype == wanted:
            return values
        bits = f"u{np.dtype(wanted).itemsize}"
        return values.astype(bits, copy=False).view(wanted)

    def _constant(self, text: str, wanted: type) -> object:
        if text.startswith("%"):
            raise Fault(f"{text} is read before it is written")
        if text.startswith(("0f", "0d")):
            return np.frombuffer(bytes.fromhex(text[2:])[::-1], wanted)[0]
        value = 0 if text == SHARED else int(text.rstrip("U"), 0)
        if wanted is np.bool_:
            return bool(value)
        bits = 8 * np.dtype(wanted).itemsize
        return np.array(value % 2**bits, f"u{bits // 8}").view(wanted)

    def _write(self, name: object, values: np.ndarray, threads: Integers) -> None:
        kind = self.kernel.registers[str(name).rstrip("0123456789")]
        if kind != "pred":
            wanted = np.dtype(type_of(kind))
            if values.dtype.itemsize != wanted.itemsize:
                values = values.astype(f"{values.dtype.kind}{wanted.itemsize}")  # keeps a sign
            values = values.view(wanted)
        if len(threads) < self.size:
            old = self.registers.get(str(name))
            whole = np.zeros(self.size, values.dtype) if old is None else old.copy()
            whole[threads] = values
            values = whole
        self.registers[str(name)] = values

    def _repack(self, instruction: Instruction, threads: Integers) -> None:
        """`mov` between one register and several that share its bits."""
        target, source = instruction.operands
        bits = bits_of(instruction.kind)
        if isinstance(target, list):
            values, each = self._read(source, f"b{bits}", threads), bits // len(target)
            for i, name in enumerate(target):
                part = values >> values.dtype.type(i * each)
                if name != "_":
                    self._write(name, part.astype(f"u{each // 8}"), threads)
        elif isinstance(source, list):
            each = bits // len(source)
            whole = np.zeros(len(threads), f"u{bits // 8}")
            for i, name in enumerate(source):
                unused = name.startswith("%") and name not in self.registers
                part = self._read(str(POISON) if unused else name, f"b{each}", threads).astype(whole.dtype)
                whole |= part << whole.dtype.type(i * each)
            self._write(target, whole, threads)

    def _addresses(self, operand: object, kind: str, threads: Integers) -> np.ndarray:
        assert isinstance(operand, Address)
        base = self._read(operand.base, kind, threads)
        return base + np.array(operand.offset).astype(base.dtype)

    def _load(self, instruction: Instruction, threads: Integers) -> None:
        target, address = instruction.operands
        if instruction.modifiers[0] == "param":
            assert isinstance(address, Address)
            self._write(target, self._argument(address.base, instruction.kind, len(threads)), threads)
            return
        names = target if isinstance(target, list) else [target]
        each = bits_of(instruction.kind) // 8
        programs = self.programs[threads]
        if instruction.modifiers[0] == "shared":
            places = self._addresses(address, "b32", threads)
            data = self.shared.load(places, each * len(names), programs, self.warps[threads])
        else:
            places = self._addresses(address, "b64", threads)
            data = self.memory.load(places, each * len(names), self.numbers[threads])
        for i, name in enumerate(names):
            part = np.ascontiguousarray(data[:, i * each : (i + 1) * each])
            self._write(name, part.view(type_of(instruction.kind))[:, 0], threads)

    def _argument(self, name: str, kind: str, count: int) -> np.ndarray:
        value, bits = self.arguments[name], bits_of(kind)
        if isinstance(value, float):
            return np.full(count, value, f"f{bits // 8}")
        return np.full(count, value % 2**bits, f"u{bits // 8}")

    def _store(self, instruction: Instruction, threads: Integers) -> None:
        address, source = instruction.operands
        parts = [
            self._read(name, f"b{bits_of(instruction.kind)}", threads)
            for name in (source if isinstance(source, list) else [source])
        ]
        data: Bytes = np.ascontiguousarray(np.stack(parts, 1)).view(np.uint8)
        programs = self.programs[threads]
        if instruction.modifiers[0] == "shared":
            places = self._addresses(address, "b32", threads)
            self.shared.store(places, data, programs, self.warps[threads])
        else:
            self.memory.store(self._addresses(address, "b64", threads), data, self.numbers[threads])

    def _matrices(
        self, instruction: Instruction, address: object, threads: Integers
    ) -> tuple[tuple[np.ndarray, np.ndarray], Iterator[tuple[np.ndarray, Integers]]]:
        """Of matrices of 8x8 numbers of 16 bits: row and column of a thread's two numbers of each; and for
        one matrix after the other, where its rows lie and which threads hold their addresses."""
        self._whole_warps(threads)
        lane, pair = np.arange(WARP)[:, None], np.arange(2)
        row, column = lane // 4 + 0 * pair, 2 * (lane % 4) + pair
        rows = self._addresses(address, "b32", threads).reshape(-1, WARP)
        warps = threads.reshape(-1, WARP)
        holders = (slice(8 * i, 8 * i + 8) for i in range(4))
        places = ((rows[:, held].reshape(-1), warps[:, held].reshape(-1)) for held in holders)
        return (column, row) if "trans" in instruction.modifiers else (row, column), places

    def _store_matrix(self, instruction: Instruction, threads: Integers) -> None:
        address, names = instruction.operands
        mine, places = self._matrices(instruction, address, threads)
        for name, (rows, owners) in zip(names, places, strict=False):
            numbers = self._read(name, "b32", threads).view(np.uint16).reshape(-1, WARP, 2)
            matrix = np.zeros((len(numbers), 8, 8), np.uint16)
            matrix[(slice(None), *mine)] = numbers
            data = matrix.reshape(-1, 8).view(np.uint8)
            self.shared.store(rows, data, self.programs[owners], self.warps[owners])

    def _load_matrix(self, instruction: Instruction, threads: Integers) -> None:
        names, address = instruction.operands
        mine, places = self._matrices(instruction, address, threads)
        for name, (rows, owners) in zip(names, places, strict=False):
            data = self.shared.load(rows, 16, self.programs[owners], self.warps[owners])
            matrix = np.ascontiguousarray(data).view(np.uint16).reshape(-1, 8, 8)
            numbers = np.ascontiguousarray(matrix[(slice(None), *mine)])
            self._write(name, numbers.view(np.uint32).reshape(-1), threads)

    def _barrier(self, instruction: Instruction, threads: Integers) -> None:
        if instruction.operands != ["0"]:
            raise Fault("not a barrier of a whole program")
        programs = np.unique(self.programs[threads])
        running = self.places < len(self.kernel.code)
        if running[np.isin(self.programs, programs)].sum() != len(threads):
            raise Fault("a barrier that not all threads reach")
        self.shared.barrier(programs)

    def _whole_warps(self, threads: Integers) -> None:
        if len(threads) % WARP or (threads.reshape(-1, WARP) % WARP != np.arange(WARP)).any():
            raise Fault("threads of the warp take no part")

    def _shuffle(self, instruction: Instruction, threads: Integers) -> None:
        """From another thread of the warp."""
        target, source, lanes, clamp, _ = instruction.operands
        self._whole_warps(threads)
        lane, moved = threads % WARP, self._read(lanes, "s32", threads)
        mode, bound = instruction.modifiers[1], int(str(clamp), 0)
        if bound not in (31, 0):
            raise Fault("segments of a warp")
        chosen = {"bfly": lane ^ moved, "idx": moved, "down": lane + moved, "up": lane - moved}[mode]
        chosen = np.where((chosen >= 0) & (chosen < WARP), chosen, lane)
        values = self._read(source, "b32", threads).reshape(-1, WARP)
        self._write(target, np.take_along_axis(values, chosen.reshape(-1, WARP), 1).reshape(-1), threads)

    def _reduce(self, instruction: Instruction, threads: Integers) -> None:
        """Of all threads of the warp."""
        target, source, _ = instruction.operands
        self._whole_warps(threads)
        function = {"max": np.max, "min": np.min, "add": np.sum}[instruction.modifiers[1]]
        values = self._read(source, instruction.kind, threads).reshape(-1, WARP)
        self._write(target, np.repeat(function(values, axis=1), WARP).astype(values.dtype), threads)
