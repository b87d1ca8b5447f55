"""Runs tests on a copy of the package, in a process forked before the package is imported.

The fork spares every mutant the import of torch and Lightning. Processes that tests start find the copy, too:
it comes first on `PYTHONPATH`, and is the working directory.
"""

from __future__ import annotations

import compileall
import contextlib
import importlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path

from benchmarks.mutants.coverage_map import Recorder

PRELOADED = ("pytest", "torch", "torchvision", "lightning", "numba", "yaml")
_FOLDERS = ("callbacks", "datamodules", "configs")  # at the root, installed inside the package


class Workspace:
    """A copy of the package whose modules can be replaced one at a time."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.root, self.folder = root, folder
        package = folder / "lightning_n2uq"
        shutil.copytree(root / "lightning_n2uq", package)
        for name in _FOLDERS:
            shutil.copytree(root / name, package / name, dirs_exist_ok=True)
        compileall.compile_dir(package, quiet=2)

    def write(self, module: str, source: str) -> None:
        """Replaces a module, whose path is relative to the root."""
        path = self.folder / module
        if not path.exists():
            path = self.folder / "lightning_n2uq" / module
        path.write_text(source)
        for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
            compiled.unlink()  # by its time and size it could pass for the new one

    def run(self, tests: list[str], limit: float, log: Path, record: Path | None = None) -> tuple[str, float]:
        """Returns `passed`, `failed` or `timeout`, and the seconds it took; `record` gets a coverage map."""
        begin, child = time.monotonic(), os.fork()
        if child == 0:
            os._exit(self._run_here(tests, log, record))
        try:
            status = _wait(child, begin + limit)
        finally:
            _end_group(child)
        outcome = "timeout" if status is None else "passed" if status == 0 else "failed"
        return outcome, time.monotonic() - begin

    def _run_here(self, tests: list[str], log: Path, record: Path | None) -> int:
        if "lightning_n2uq" in sys.modules:
            log.write_text("the package was imported before the fork: tests would not see the mutant\n")
            return 3
        os.setsid()
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        os.chdir(self.folder)
        os.environ |= {"PYTHONPATH": str(self.folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        sys.dont_write_bytecode = True
        sys.path[:] = [str(self.folder), *(p for p in sys.path if Path(p or ".").resolve() != self.root)]
        try:
            pytest = importlib.import_module("pytest")
            recorder = Recorder(self.folder / "lightning_n2uq") if record else None
            settings = ["-c", str(self.root / "pyproject.toml"), f"--rootdir={self.root}"]
            quick = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short"]
            quick += [
                "-W",
                "ignore::pytest.PytestAssertRewriteWarning",
            ]  # plugins are preloaded with lightning
            arguments = [*settings, *quick, *(_absolute(self.root, test) for test in tests)]
            code = int(pytest.main(arguments, plugins=[recorder] if recorder else []))
            if recorder and record:
                recorder.write(record, self.folder)
            return code
        except BaseException as error:
            print(f"{type(error).__name__}: {error}")
            return 3
        finally:
            sys.stdout.flush()


def preload() -> None:
    """Imports what every trial needs but the package itself."""
    for name in PRELOADED:
        importlib.import_module(name)


def _absolute(root: Path, argument: str) -> str:
    return str(root / argument) if argument.startswith("tests/") else argument


def _wait(child: int, deadline: float) -> int | None:
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _end_group(child: int) -> None:
    """Ends what the tests left behind."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
