"""Processes forked from a server that has imported torch, Lightning and the package: they start in no time.

There is one server for each process of pytest. It imports by name what is installed, since it does not see
`sys.path` of the tests yet.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path

PRELOADED = [
    "torchvision",
    "lightning.pytorch",
    "sklearn.datasets",
    "numba",
    "lightning_n2uq.strategies",
    "lightning_n2uq.modules",
    "lightning_n2uq.datamodules",
    "lightning_n2uq.callbacks",
    "lightning_n2uq.cli.training",
    "lightning_n2uq.export.command",
    "lightning_n2uq.export.runtime.fast_engine",
    "lightning_n2uq.ops.backends.numba.fused_activation",
    "lightning_n2uq.ops.backends.numba.fused_activation_rows",
    "lightning_n2uq.ops.backends.numba.gradient_codec",
    "lightning_n2uq.ops.backends.numba.residual",
    "lightning_n2uq.ops.backends.numba.residual_rows",
    "lightning_n2uq.ops.backends.numba.stem",
    "lightning_n2uq.ops.backends.numba.threshold",
    "lightning_n2uq.ops.backends.numba.weight",
    "lightning_n2uq.ops.backends.onednn.integer",
    "torch._dynamo.convert_frame",  # half of the time of a first `torch.compile`
    "pandas",
    "wandb",
]


def context() -> ForkServerContext:
    """Returns a context whose processes have all of `PRELOADED`."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(PRELOADED)
    return found


def start(
    *arguments: str, cwd: Path, env: Mapping[str, str], out: Path, err: Path
) -> multiprocessing.process.BaseProcess:
    """Starts the command, as `subprocess.Popen` would start `python -m lightning_n2uq`."""
    process = context().Process(target=_command, args=(arguments, str(cwd), dict(env), str(out), str(err)))
    process.start()
    return process


def n2uq(
    *arguments: str, cwd: Path, env: Mapping[str, str], timeout: float = 300.0
) -> subprocess.CompletedProcess[str]:
    """Runs the command, as `subprocess.run` with captured output would run `python -m lightning_n2uq`."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = start(*arguments, cwd=cwd, env=env, out=out, err=err)
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(["n2uq", *arguments], timeout)
        code = process.exitcode
        return subprocess.CompletedProcess(["n2uq", *arguments], code, out.read_text(), err.read_text())


def _command(arguments: Sequence[str], cwd: str, env: dict[str, str], out: str, err: str) -> None:
    for number, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.path[:0] = [cwd, *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    sys.argv = [str(Path(sys.executable).with_name("n2uq")), *arguments]  # started again for further ranks

    from lightning_n2uq.cli import main

    try:
        sys.exit(main())
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
