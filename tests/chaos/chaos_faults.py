"""What goes wrong: while a command runs, or between two of them.

A fault that strikes a running command is a context: entered when the command has run for a while, left when
the command has ended or some seconds later, so that the next attempt finds everything mended.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from chaos_run import Run

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGKILL)
Strike = Callable[[Run, Path, random.Random, int], contextlib.AbstractContextManager[None]]


@contextlib.contextmanager
def _signal(run: Run, folder: Path, rng: random.Random, ranks: int) -> Iterator[None]:
    run.send(rng.choice(SIGNALS), rng.randrange(ranks))
    yield


@contextlib.contextmanager
def _two_signals(run: Run, folder: Path, rng: random.Random, ranks: int) -> Iterator[None]:
    run.send(rng.choice(SIGNALS[:3]), rng.randrange(ranks))
    time.sleep(rng.random())
    run.send(rng.choice(SIGNALS), rng.randrange(ranks))
    yield


@contextlib.contextmanager
def _stop_and_go(run: Run, folder: Path, rng: random.Random, ranks: int) -> Iterator[None]:
    """A rank stands still; for longer than the others wait, now and then."""
    rank = rng.randrange(ranks)
    run.send(signal.SIGSTOP, rank)
    time.sleep(rng.choice((0.5, 2.0, 2.0, 40.0 if ranks > 1 else 4.0)))
    run.send(signal.SIGCONT, rank)
    yield


@contextlib.contextmanager
def _full_disk(run: Run, folder: Path, rng: random.Random, ranks: int) -> Iterator[None]:
    """The disk of the run's files is full (a small file system is mounted there)."""
    filler = folder / "runs" / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(2 ** rng.choice((4, 10, 16))))
    try:
        if rng.random() < 0.3:
            run.wait(2.0)
            filler.unlink()
        yield
    finally:
        filler.unlink(missing_ok=True)


@contextlib.contextmanager
def _broken_image(run: Run, folder: Path, rng: random.Random, ranks: int) -> Iterator[None]:
    image = rng.choice(sorted((folder / "images").rglob("*.png")))
    whole, times = image.read_bytes(), image.stat()
    image.write_bytes(_damaged(whole, rng))
    try:
        yield
    finally:
        image.write_bytes(whole)
        os.utime(image, ns=(times.st_atime_ns, times.st_mtime_ns))


@contextlib.contextmanager
def _second_command(run: Run, folder: Path, rng: random.Random, ranks: int) -> Iterator[None]:
    """The same command once more while the first runs; it may train only when the first has ended."""
    other = Run(folder, f"second{time.monotonic_ns()}")
    try:
        yield
    finally:
        if other.wait(120) is None:
            other.send(signal.SIGKILL)
        other.left_over(20)


@contextlib.contextmanager
def _cut_link(run: Run, folder: Path, rng: random.Random, ranks: int) -> Iterator[None]:
    """The ranks' network is gone, for a moment or for good."""
    link = ["ip", "netns", "exec", namespace(folder), "ip", "link", "set", "lo"]
    subprocess.run([*link, "down"], check=True, timeout=30)
    try:
        if rng.random() < 0.5:
            run.wait(2.0)
            subprocess.run([*link, "up"], check=True, timeout=30)
        yield
    finally:
        subprocess.run([*link, "up"], check=True, timeout=30)


def _damaged(content: bytes, rng: random.Random) -> bytes:
    """Returns bytes cut short, emptied, or with one of them changed."""
    kind = rng.randrange(3)
    if kind == 0 or not content:
        return b""
    place = rng.randrange(len(content))
    if kind == 1:
        return content[:place]
    return content[:place] + bytes([content[place] ^ (1 << rng.randrange(8))]) + content[place + 1 :]


def damage_checkpoint(folder: Path, rng: random.Random) -> str:
    """Damages or deletes a checkpoint, the newest one as a rule; returns what was done."""
    files = sorted(folder.glob("runs/job/*/*.ckpt"), key=lambda file: file.stat().st_mtime_ns)
    if not files:
        return "no checkpoint to damage"
    file = files[-1] if rng.random() < 0.7 else rng.choice(files)
    if rng.random() < 0.2:
        file.unlink()
        return f"deleted {file.name}"
    file.write_bytes(_damaged(file.read_bytes(), rng))
    return f"damaged {file.name}"


def damage_cache(folder: Path, rng: random.Random) -> str:
    """Damages some of the compiled kernels in the job's own cache."""
    kinds = (".nbi", ".nbc", ".kernel")
    files = sorted(file for file in (folder / "cache").rglob("*") if file.suffix in kinds)
    chosen = rng.sample(files, min(len(files), rng.randrange(1, 6)))
    for file in chosen:
        file.write_bytes(_damaged(file.read_bytes(), rng))
    return f"damaged {', '.join(file.name for file in chosen)}"


def namespace(folder: Path) -> str:
    """Returns the name of the network namespace that a trial's ranks live in."""
    return f"chaos{os.getpid()}-{folder.name}"


STRIKES: dict[str, Strike] = {
    "signal": _signal,
    "two signals": _two_signals,
    "stop and go": _stop_and_go,
    "full disk": _full_disk,
    "broken image": _broken_image,
    "second command": _second_command,
    "cut link": _cut_link,
}
BETWEEN: dict[str, Callable[[Path, random.Random], str]] = {
    "damaged checkpoint": damage_checkpoint,
    "damaged cache": damage_cache,
}


@contextlib.contextmanager
def small_disk(folder: Path, size: int = 3 * 2**20) -> Iterator[None]:
    """Mounts a small file system where the job's runs go; root only."""
    place = folder / "runs"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@contextlib.contextmanager
def own_network(folder: Path) -> Iterator[tuple[str, ...]]:
    """Makes a network of its own for the job; gives the words that start a command in it; root only."""
    name = namespace(folder)
    subprocess.run(["ip", "netns", "add", name], check=True, timeout=30)
    try:
        inside = ("ip", "netns", "exec", name)
        subprocess.run([*inside, "ip", "link", "set", "lo", "up"], check=True, timeout=30)
        yield inside
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True, timeout=30)


def possible(job: str, ranks: int) -> list[str]:
    """Returns the names of the faults that can strike a job on this machine."""
    names = ["signal", "signal", "two signals", "stop and go", "second command", *BETWEEN]
    root = os.geteuid() == 0
    if root and shutil.which("mount"):
        names.append("full disk")
    if job == "images":
        names += ["broken image", "broken image"]
    if root and ranks > 1 and shutil.which("ip"):
        names += ["cut link", "cut link"]
    return names
