"""Somebody with a folder of images follows docs/own_images.md: seven commands at most, no source."""

import contextlib
import io
import os
import runpy
import sys
import venv
from pathlib import Path

import pytest

import apart
import newcomer
from lightning_n2uq.cli import main

ROOT = Path(__file__).parents[2]
QUIET = ["--wandb", "disabled", "--data.num_workers", "0", "--trainer.accelerator", "cpu"]


def test_the_way_is_short_and_readme_shows_it():
    assert len(newcomer.commands()) <= 7
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(command in readme for command in newcomer.commands() if command.startswith("n2uq "))
    code = [
        line
        for line in newcomer.script().splitlines()
        if line and not line.startswith(("#", "import", "from"))
    ]
    assert len(code) <= 12


def in_process(words):
    """Runs a command in this process, which has imported everything already."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.MonkeyPatch.context() as patch:
        if words[0] == "n2uq":
            assert main(words[1:]) == 0, words
        else:
            patch.setattr(sys, "argv", words[1:])
            runpy.run_path(words[1], run_name="__main__")
    return out.getvalue()


@pytest.mark.integration
def test_from_images_to_a_deployed_network(in_empty_folder):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (extra 'export')")
    pytest.importorskip("plotly", reason="plotly is not installed (extra 'report')")
    newcomer.follow(in_empty_folder, in_process, *QUIET)


@pytest.mark.slow
def test_the_same_from_a_wheel_in_a_clean_environment(tmp_path):
    """Nothing of this folder is seen there but the documentation."""
    clean = tmp_path / "clean"
    venv.create(clean, with_pip=True)
    python = str(clean / "bin" / "python")
    build = [python, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path / "dist"), str(ROOT)]
    apart.run(build, tmp_path)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    install = [python, "-m", "pip", "install", "--quiet", f"{wheel}[report,export,figures]"]
    apart.run(install, tmp_path, timeout=3000)
    folder = tmp_path / "newcomer"
    folder.mkdir()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "N2UQ", "LIGHTNING"))}
    environment["PATH"] = f"{clean / 'bin'}{os.pathsep}{environment['PATH']}"

    newcomer.follow(folder, lambda words: apart.run(words, folder, environment))
