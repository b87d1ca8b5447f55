"""The commands of README and docs run, or go through their parser where they take long: `make docs-check`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import docs_pages
import warm
from docs_pages import ROOT
from lightning_n2uq.cli.commands import TRAINING_COMMANDS

pytestmark = pytest.mark.slow

NOT_RUN = {
    r"make |pytest ": "runs tests, training or measurements for minutes",
    r"pip |wandb |n2uq dashboard": "needs a network, or an account",
    r"python -m pytest|python -m timeit|.*CACHE_DIR": "compiles kernels, or measures, for minutes",
    r"python -m benchmarks\.mutants": "needs cosmic-ray, which `make mutants` installs",
    r"TORCH=|g\+\+ |\./run": "compiles a program; tests/export/test_pt2_export.py runs it",
    r"python -m venv|git clone|finn-env": "needs a network, and FINN",
    r"n2uq convert": "needs a published checkpoint; tests/interop makes one",
    r"n2uq advise (RUN|runs/|--ckpt_path)": "needs a run of several ranks, as tests/callbacks has",
    r"n2uq export .*--engines|.*\.zip|n2uq predict --images": "needs a trained network's images",
    r"python .*staircase": "draws a network that has been trained",
}
"""Beginnings of commands that are not run, and why. Their flags are checked nevertheless (test_docs.py)."""
MEASURES = r"python (-m )?benchmarks(?!\.scale --ranks)"
CKPT = r"(runs/\S*|best|RUN/best|n2uq_r18)\.ckpt|\bbest\.ckpt"
CONFIG = "digits/n2uq_w2a2.yaml"
RUN = r"RUN|RUN_DIR|runs/\S+/TIME"


def found() -> list[str]:
    """Commands to try, each once; of those that measure, one for each program."""
    kept = {}
    for piece in docs_pages.commands():
        if not any(re.match(pattern, piece.text) for pattern in NOT_RUN):
            same = " ".join(piece.text.split()[:3]) if re.match(MEASURES, piece.text) else piece.text
            kept.setdefault(same, piece.text)
    return list(kept.values())


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a network has been trained for an epoch of two steps."""
    folder = tmp_path_factory.mktemp("docs")
    fit = ["fit", "--config", CONFIG, "--checkpoint.dirpath", "made"]
    fit += ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2"]
    plain = os.environ | {"LIGHTNING_N2UQ_KERNELS": "reference"}  # nothing to compile for two steps
    done = warm.n2uq(*fit, cwd=folder, env=plain, timeout=900.0)
    assert done.returncode == 0, done.stderr
    return folder


def made(folder: Path, suffix: str) -> Path:
    return next(iter(sorted(folder.rglob(suffix))))


def test_every_exception_is_still_needed() -> None:
    texts = [piece.text for piece in docs_pages.commands()]
    assert [p for p in NOT_RUN if not any(re.match(p, text) for text in texts)] == []


def without_placeholders(words: list[str], folder: Path) -> list[str]:
    """The words with the finished run's files where the docs leave a gap."""
    run = str(made(folder, "metrics.csv").parent)
    filled = [re.sub(CKPT, str(made(folder, "*.ckpt")), word) for word in words]
    filled = [run if re.fullmatch(RUN, word) else word for word in filled]
    configs = {i + 1 for i, word in enumerate(filled) if word == "--config"}
    filled = [CONFIG if word == "FILE" and i in configs else word for i, word in enumerate(filled)]
    gaps = {i - 1 for i, word in enumerate(filled) if word == "..." and filled[i - 1].startswith("--")}
    kept = [word for i, word in enumerate(filled) if i not in gaps and word != "..."]
    return [word for word in kept if not word.startswith("[") and not word.endswith("]")]


def bounded(words: list[str]) -> list[str]:
    """Training goes as far as its parser, a command that is only named as far as its help."""
    if not words or "/" in words or "|" in words[-1]:
        return ["--help"]
    if words[0] in TRAINING_COMMANDS:
        words = [word for word in words if word not in ("--resume", "auto")]
        config = [] if "--config" in words else ["--config", CONFIG]
        return [*words, *config, "--print_config"]
    named = len(words) == 1 and words[0] != "configs"
    return [*words, "--help"] if named or ("export" in words and "--ckpt" not in "".join(words)) else words


@pytest.mark.parametrize("command", found(), ids=lambda command: re.sub(r"\W+", "-", command)[:60])
def test_command(command: str, finished_run: Path) -> None:
    program, *rest = docs_pages.words(command)
    if program == "for":  # a loop over bit widths
        program, *rest = docs_pages.words(re.search(r"do (.*?);", command)[1].replace("$bits", "w2a2"))
    if program == "python":
        named = rest[: 2 if rest[0] == "-m" else 1]
        rest = [*named, "--help"] if re.match(MEASURES, command) else [*rest, "--help"][: len(rest) or 1]
        done = subprocess.run(
            [sys.executable, *rest], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
        )
    else:
        words = bounded(without_placeholders(rest, finished_run))
        # Only the parser of training commands runs beside the examples: nothing is written there.
        own = words[0] in TRAINING_COMMANDS and any((ROOT / "examples" / word).is_file() for word in words)
        done = warm.n2uq(*words, cwd=ROOT / "examples" if own else finished_run, env=os.environ)
    assert done.returncode == 0, done.stderr
