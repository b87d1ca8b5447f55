"""One trial: a job under random faults must end exactly as an undisturbed one, or say in one line why not."""

from __future__ import annotations

import contextlib
import csv
import random
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import chaos_faults
import chaos_jobs
import torch
from chaos_run import Run

from lightning_n2uq.checkpointing.seal import is_intact

LIMIT = 300.0  # seconds of one command; the undisturbed ones take ten
COMPILING = 1800.0  # seconds of the first one, which compiles all kernels
CODES = {0, 1, 2, 3, 130, 138, 143, -2, -9, -10, -15}
"""Of commands that a fault struck; negative ones are signals that came before anybody could listen."""


class LostError(Exception):
    """What must never happen: the reason."""


@dataclass
class Reference:
    """An undisturbed job: its final state, the rows of its metrics and how long it took."""

    state: dict[str, Any]
    rows: list[dict[str, str]]
    seconds: float


@dataclass
class Record:
    """What happened in a trial; `outcome` is `exact`, `named` or `lost`."""

    seed: int
    job: str = ""
    events: list[str] = field(default_factory=list)
    outcome: str = "lost"
    detail: str = ""
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields by name."""
        return asdict(self)


def reference(folder: Path, job: str, cache: Path) -> Reference:
    """Runs a job without faults."""
    folder.mkdir(parents=True)
    chaos_jobs.write(folder, job)
    began = time.monotonic()
    run = Run(folder, "whole", {"NUMBA_CACHE_DIR": str(cache)})
    if run.wait(COMPILING) != 0:
        raise RuntimeError(f"{job}: fails without any fault: {run.errors()[-2000:]}")
    (done,) = _run_folders(folder)
    return Reference(_state(done), _rows(done), time.monotonic() - began)


def trial(seed: int, folder: Path, references: Mapping[str, Reference], cache: Path) -> Record:
    """Runs one job through one to three faults, then without faults to its end."""
    rng, record, began = random.Random(seed), Record(seed), time.monotonic()
    record.job = rng.choice(sorted(references))
    ranks = chaos_jobs.ranks(record.job)
    names = chaos_faults.possible(record.job, ranks)
    faults = [rng.choice(names) for _ in range(rng.randrange(1, 4))]
    folder.mkdir(parents=True)
    chaos_jobs.write(folder, record.job)
    with contextlib.ExitStack() as stack:
        variables, before = {"NUMBA_CACHE_DIR": str(cache)}, ()
        if "damaged cache" in faults:
            variables["NUMBA_CACHE_DIR"] = str(folder / "cache")
            shutil.copytree(cache, folder / "cache")
        if "full disk" in faults:
            stack.enter_context(chaos_faults.small_disk(folder))
        if "cut link" in faults:
            before = stack.enter_context(chaos_faults.own_network(folder))
        attempts = _Attempts(folder, rng, record, variables, before)
        try:
            for fault in faults:
                attempts.under(fault, references[record.job].seconds, ranks)
            attempts.to_the_end()
            if record.outcome != "named":
                _compare(references[record.job], folder, alone="second command" not in faults)
                record.outcome = "exact"
        except LostError as error:
            record.outcome, record.detail = "lost", str(error)
    record.seconds = round(time.monotonic() - began, 1)
    return record


class _Attempts:
    """The commands of one trial, one after the other."""

    def __init__(
        self,
        folder: Path,
        rng: random.Random,
        record: Record,
        variables: Mapping[str, str],
        before: tuple[str, ...],
    ) -> None:
        self.folder, self.rng, self.record = folder, rng, record
        self.variables, self.before = variables, before
        self.count = 0
        self.damaged = False

    def under(self, fault: str, usual: float, ranks: int) -> None:
        """Runs the command with a fault at a random moment, or damages what lies there between two."""
        if fault in chaos_faults.BETWEEN:
            self.record.events.append(chaos_faults.BETWEEN[fault](self.folder, self.rng))
            self.damaged |= fault == "damaged checkpoint"
            return
        run = self._start()
        ended = self._until_a_moment(run, usual)
        if ended is not None:
            self._check(run, ended, f"{fault} (too late)")
            return
        with chaos_faults.STRIKES[fault](run, self.folder, self.rng, ranks):
            code = run.wait(LIMIT)
            self._check(run, code, fault)

    def to_the_end(self) -> None:
        """Runs the command without faults; what was damaged may be refused, in one line."""
        for _ in range(2):
            run = self._start()
            code = run.wait(LIMIT)
            self._check(run, code, "undisturbed")
            if code == 0:
                return
            if self.damaged and code == 2 and "without --resume a new run starts" in run.errors():
                self.record.outcome = "named"
                return
        raise LostError(f"an undisturbed command ends with {code}: {_last_line(run)}")

    def _start(self) -> Run:
        self.count += 1
        return Run(self.folder, f"attempt{self.count}", self.variables, self.before)

    def _until_a_moment(self, run: Run, usual: float) -> int | None:
        """Waits for a while, or until the run has written so many rows; returns a code if it has ended."""
        if self.rng.random() < 0.5:
            return run.wait(self.rng.random() * usual)
        lines, deadline = self.rng.randrange(1, 20), time.monotonic() + LIMIT
        while time.monotonic() < deadline:
            if (code := run.wait(0.02)) is not None:
                return code
            files = self.folder.glob("runs/job/*/metrics.csv")
            if sum(file.read_bytes().count(b"\n") for file in files) >= lines:
                break
        return None

    def _check(self, run: Run, code: int | None, event: str) -> None:
        """Checks how a command ended and what it left."""
        self.record.events.append(f"{event}: {code}")
        left = run.left_over(30)
        errors = run.errors()
        if code is None:
            raise LostError(f"{event}: the command hangs: {_last_line(run)}")
        if left:
            raise LostError(f"{event}: processes {left} are left over")
        if code not in CODES:
            raise LostError(f"{event}: exit code {code}: {_last_line(run)}")
        if "Traceback" in errors and not _reaches_the_command(errors):
            return  # struck before the interpreter had begun with the command
        if "Traceback" in errors:
            raise LostError(f"{event}: a traceback, exit code {code}: {_last_line(run)}")
        if code in (1, 2, 3) and "n2uq: error: " not in errors:
            raise LostError(f"{event}: exit code {code} without a line that says why")
        if not self.damaged:
            broken = [file for file in self.folder.glob("runs/job/*/*.ckpt") if is_intact(file) is False]
            if broken:
                raise LostError(f"{event}: broken checkpoints {[file.name for file in broken]}")


def _reaches_the_command(errors: str) -> bool:
    """Returns whether a traceback has a line of ours; the finder of an editable installation is none."""
    lines = errors.partition("Traceback")[2].splitlines()
    return any("lightning_n2uq" in line and "__editable__" not in line for line in lines)


def _last_line(run: Run) -> str:
    lines = [line for line in run.errors().splitlines() if line.strip()]
    return lines[-1][:300] if lines else "(no output)"


def _run_folders(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("runs/job/*")) if (path / "last.ckpt").is_file()]


def _state(folder: Path) -> dict[str, Any]:
    """Returns all of the last checkpoint that training depends on."""
    checkpoint = torch.load(folder / "last.ckpt", weights_only=True)
    kept = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch", "nuqsgd")
    random_state = checkpoint["exact_resume"]["ranks"]
    return {**{key: checkpoint.get(key) for key in kept}, "random": random_state}


def _rows(folder: Path) -> list[dict[str, str]]:
    """Returns metrics.csv without averages of interrupted epochs, their marks and the clock's column."""
    left_out = ("train/acc", "resume/batch", "speed/steps_per_second")
    with (folder / "metrics.csv").open(newline="") as file:
        rows = [
            {k: v for k, v in row.items() if v and k not in left_out}
            for row in csv.DictReader(file)
            if not row.get("resume/batch")
        ]
    return [row for row in rows if row.keys() - {"epoch", "step"}]


def _compare(wanted: Reference, folder: Path, alone: bool) -> None:
    """Compares what was trained with the undisturbed result.

    Two commands that begin at once, before there is a checkpoint, are two runs; one of them is finished, and
    the other may have been struck.
    """
    runs = _run_folders(folder)
    if not runs or (alone and len(runs) > 1):
        raise LostError(f"{len(runs)} runs in {[path.name for path in folder.glob('runs/job/*')]}")
    found = [_difference(wanted, run) for run in runs]
    if all(found):
        raise LostError(found[-1])


def _difference(wanted: Reference, folder: Path) -> str:
    """Returns in words how a run differs from the undisturbed one; nothing where it does not."""
    if paths := differing(wanted.state, _state(folder)):
        return f"{len(paths)} values differ from the undisturbed run's, {paths[0]}"
    found = _rows(folder)
    if found == wanted.rows:
        return ""
    equal = (one == other for one, other in zip(found, wanted.rows, strict=False))
    same = next((number for number, fits in enumerate(equal) if not fits), "the end")
    return f"metrics.csv: {len(found)} rows, not {len(wanted.rows)}, others from {same} on"


def differing(left: Any, right: Any, path: str = "") -> list[str]:
    """Returns the paths at which two nested values differ, tensors compared bit for bit."""
    if isinstance(left, dict) and isinstance(right, dict):
        keys = left.keys() | right.keys()
        return [p for k in keys for p in differing(left.get(k), right.get(k), f"{path}/{k}")]
    if isinstance(left, list | tuple) and isinstance(right, list | tuple) and len(left) == len(right):
        pairs = enumerate(zip(left, right, strict=True))
        return [p for i, (a, b) in pairs for p in differing(a, b, f"{path}/{i}")]
    same = torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right
    return [] if same else [path]
