"""Runs code under Triton's interpreter, where there is one."""

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from packaging.version import Version


def need_interpreter() -> None:
    """Skips the test where there is no Triton, or one that its numpy is too new for."""
    triton = pytest.importorskip("triton")
    if Version(triton.__version__) < Version("3.7") and Version(numpy.__version__) >= Version("2.4"):
        pytest.skip("the interpreter of Triton before 3.7 needs numpy before 2.4")


def interpret(code: str) -> str:
    """Returns what the code prints in a process that finds this folder's modules and tests/support."""
    need_interpreter()
    here = Path(__file__).parent
    paths = os.pathsep.join(map(str, (here, here.parent / "support")))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
