"""Plain `pytest` finds every test's modules, from any folder, and fails where STRICT_SKIPS finds a skip."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[1]
NAMES = "tests/benchmarks/test_instructions.py", "tests/ops/test_compiled_large.py", "tests/ptx/"
FILES = [ROOT / name for name in NAMES]
PROBE = """
import importlib.util
import multiprocessing
import sys


def seen() -> list[bool]:
    names = "callbacks", "benchmarks.netlab", "ptx_emulator"
    return [importlib.util.find_spec(name) is not None for name in names]


def test_probe() -> None:
    assert seen() == [False, True, True]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(seen) == [False, True, True]
"""
SKIPPING = """
import pytest


@pytest.mark.parametrize("reason", ["needs a GPU", "not installed"])
def test_skipped(reason: str) -> None:
    pytest.skip(reason)
"""


def pytest_alone(folder: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    command = [Path(sys.executable).with_name("pytest"), "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(
        command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("elsewhere", [False, True])
def test_files_are_collected_from_any_folder(elsewhere: bool, tmp_path: Path) -> None:
    found = pytest_alone(tmp_path if elsewhere else ROOT, "--collect-only", "-m", "", *FILES)
    assert found.returncode == 0, found.stdout
    assert all(name in found.stdout for name in NAMES)


@pytest.mark.parametrize("folder", [ROOT, ROOT / "tests" / "ops"])
def test_the_root_is_not_on_the_path(folder: Path, tmp_path: Path) -> None:
    probe = tmp_path / "test_probe.py"
    probe.write_text(PROBE)
    found = pytest_alone(folder, "-c", ROOT / "pyproject.toml", probe)
    assert found.returncode == 0, found.stdout


def test_only_skips_that_nothing_can_help_pass_under_strict_skips(tmp_path: Path) -> None:
    file = tmp_path / "test_skipping.py"
    file.write_text(SKIPPING)
    path = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    found = pytest_alone(tmp_path, "-p", "conftest", file, STRICT_SKIPS="1", PYTHONPATH=path)
    assert found.returncode == 1
    refused = "STRICT_SKIPS: 1 skipped that should run: test_skipping.py::test_skipped[not installed]"
    assert refused in found.stdout
